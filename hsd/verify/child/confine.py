"""What a sandboxed process gives up, from inside it. Standard library only; run by path, without site-packages.

Each layer stands alone, so that what one kernel or container refuses, another may still stop. bubblewrap has started
this process where it may; without it the first two layers here are all there is against files:

    user         root becomes nobody
    landlock     reads the Python installation and nothing else, writes nothing; no TCP, no signals to others
    seccomp      a list of system calls that Python needs, by `hsd.verify.syscalls`; all others do not exist
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable

NOBODY = 65534
THREADS = 64

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)
if sys.platform == "linux":  # elsewhere the verifiers without a child process still import
    _libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    _libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def lower_limits(cpu: float, memory: int, file_size: int, threads: int | None = None) -> None:
    """Resource limits of this process and its children: seconds of CPU time, bytes of address space, bytes of a file,
    processes of this user (only where nobody else is that user)."""
    seconds = max(1, int(cpu + 0.999))
    wanted = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (file_size, file_size),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (memory, memory),
    }
    if threads is not None:
        wanted[resource.RLIMIT_NPROC] = (threads, threads)
    for which, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    deep = 64 << 20  # recursion through C, as lru_cache's, overflows 8 MiB at a depth of about 20,000
    resource.setrlimit(resource.RLIMIT_STACK, (deep if stack == resource.RLIM_INFINITY else min(deep, stack), stack))


def become_nobody(layers: list[str]) -> list[str]:
    if "user" not in layers or os.geteuid() != 0:
        return []
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return []
    return ["user"]


def die_with_parent() -> None:
    """This process is killed when the one that made it ends, and others of its user cannot trace it or read its
    memory. After the last change of user, which would undo it."""
    _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def shut_files(layers: list[str], readable: list[str]) -> list[str]:
    """Gives up files and TCP for good. Twice nests: a process may then signal its child, and not the other way round,
    so that `die_with_parent` needs a keeper that is shut in before it forks."""
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return _granted("landlock", lambda: _landlock(readable), layers)


def shut_calls(layers: list[str], filter: bytes) -> list[str]:
    """Gives up all system calls that `filter` (a BPF program) does not let through. After `shut_files`."""
    return _granted("seccomp", lambda: _seccomp(filter), layers) if filter else []


def _granted(name: str, restrict: Callable[[], None], layers: list[str]) -> list[str]:
    if name not in layers:
        return []
    try:
        restrict()
    except OSError:
        return []
    return [name]


def _seccomp(filter: bytes) -> None:
    buffer = ctypes.create_string_buffer(filter, len(filter))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(filter) // 8, ctypes.addressof(buffer))
    _checked(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program), 0, 0))


# linux/landlock.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3


def landlock_abi() -> int:
    """0 where the kernel has no Landlock."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def _landlock(readable: list[str]) -> None:
    abi = landlock_abi()
    if not abi:
        raise OSError("no Landlock")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    net, scoped = 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = (ctypes.c_uint64 * 3)(files, net, scoped)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    for path in readable:
        _allow(ruleset, path, _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE)
    _allow(ruleset, "/dev/null", _READ_FILE | _WRITE_FILE)
    _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rule = access.to_bytes(8, sys.byteorder) + fd.to_bytes(4, sys.byteorder)  # packed: u64, s32
    _checked(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    os.close(fd)
