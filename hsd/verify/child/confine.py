"""What a sandboxed process gives up, from inside it. Standard library only; run by path under `python -I`.

Each layer stands alone, so that what one kernel or container refuses, another may still stop:

    user         root becomes nobody
    namespaces   user, network, IPC and PID namespaces of its own, then no capabilities
    landlock     reads the Python installation and nothing else, writes nothing; no TCP, no signals to others
    seccomp      no processes, programs, sockets, signals, tracing, shared memory, mounts; threads are allowed
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import sysconfig
from collections.abc import Callable

LAYERS = ("user", "namespaces", "landlock", "seccomp")
NOBODY = 65534
THREADS = 64

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)
if sys.platform == "linux":
    _libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    _libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def lower_limits(cpu: float, memory: int, file_size: int) -> None:
    """Resource limits of this process and its children: seconds, bytes of address space, bytes of a file."""
    seconds = max(1, int(cpu + 1.5))  # the wall clock ends it before, unless it runs in several threads
    wanted = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (file_size, file_size),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_AS: (memory, memory),
    }
    for which, (soft, hard) in wanted.items():
        ceiling = resource.getrlimit(which)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    deep = 64 << 20  # recursion through C, as lru_cache's, overflows 8 MiB at a depth of about 20,000
    resource.setrlimit(resource.RLIMIT_STACK, (deep if stack == resource.RLIM_INFINITY else min(deep, stack), stack))


def separate(layers: list[str]) -> list[str]:
    """Another user and namespaces; the layers of these two that were granted. A child forked next is in them."""
    granted = []
    if "user" in layers and os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            granted.append("user")
        except OSError:
            pass
    if "namespaces" in layers and sys.platform == "linux":
        flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID
        if _libc.unshare(flags) == 0:
            granted.append("namespaces")
    return granted


def die_with_parent() -> None:
    """This process is killed when the one that made it ends, and others of its user cannot trace it or read its
    memory. After the last change of user, which would undo it."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def shut_files(layers: list[str]) -> list[str]:
    """Gives up files and TCP for good. Twice nests: a process may then signal its child, and not the other way round,
    so that `die_with_parent` needs a keeper that is shut in before it forks."""
    if sys.platform != "linux":
        return []
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    return _granted("landlock", _landlock, layers)


def shut_calls(layers: list[str], separated: list[str]) -> list[str]:
    """Gives up capabilities, new processes and all else that the filter denies. After `shut_files`."""
    if "namespaces" in separated:
        _drop_capabilities()
        resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))  # counted within the namespace
    return _granted("seccomp", _seccomp, layers) if sys.platform == "linux" else []


def _granted(name: str, restrict: Callable[[], None], layers: list[str]) -> list[str]:
    if name not in layers:
        return []
    try:
        restrict()
    except OSError:
        return []
    return [name]


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()))


# -- Landlock (linux/landlock.h) --------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3


def landlock_abi() -> int:
    """0 where the kernel has no Landlock."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)) if sys.platform == "linux" else 0


def readable_paths() -> list[str]:
    """The Python installation, its packages and the system's libraries."""
    roots = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)}
    inside = [os.path.realpath(p) for p in (*sys.path, *sysconfig.get_paths().values()) if p]
    packages = [p for p in inside if any(p.startswith(root + os.sep) for root in roots)]
    lib = [os.path.join(root, name) for root in roots for name in ("lib", "lib64")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom"]
    return [p for p in dict.fromkeys([*packages, *lib, *system]) if os.path.exists(p)]


def _landlock() -> None:
    abi = landlock_abi()
    if not abi:
        raise OSError("no Landlock")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    net, scoped = 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = (ctypes.c_uint64 * 3)(files, net, scoped)
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    for path in readable_paths():
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


# -- seccomp: a filter over system call numbers -----------------------------------------------------------------------

# (x86_64, the generic table: aarch64); None where it does not exist.
_DENIED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "setsid": (112, 157), "setpgid": (109, 154),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    "socket": (41, 198), "io_uring_setup": (425, 425),  # the ring does what a filter cannot see
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),  # outlive the process
    "memfd_create": (319, 279),  # memory beyond RLIMIT_AS
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41),
    "mount": (165, 40), "umount2": (166, 39), "open_tree": (428, 428), "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column
_CLONE, _CLONE3, _PRLIMIT64 = (56, 220), (435, 435), (302, 261)
CLONE_THREAD, X32 = 0x00010000, 0x40000000
EPERM, ENOSYS = 1, 38

_LOAD, _RETURN = 0x20, 0x06
_EQUAL, _AT_LEAST, _BITS = 0x15, 0x35, 0x45
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument, little endian
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    arch, column = _MACHINES[machine]
    deny = (_RETURN, 0, 0, _ERRNO | EPERM)
    lines = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    lines += [(_AT_LEAST, 0, 1, X32), deny]
    for pair in _DENIED.values():
        if pair[column] is not None:
            lines += [(_EQUAL, 0, 1, pair[column]), deny]
    # glibc falls back to clone(), whose flags can be seen
    lines += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | ENOSYS)]
    lines += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _ARG0), (_BITS, 4, 0, CLONE_THREAD), deny]
    lines += [(_EQUAL, 0, 2, _PRLIMIT64[column]), (_LOAD, 0, 0, _ARG0), (_EQUAL, 0, 1, 0)]  # its own limits only
    return [*lines, (_RETURN, 0, 0, _ALLOW), deny]


def _seccomp() -> None:
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"no filter for {machine}")
    lines = _program(machine)
    code = b"".join(
        op.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little") for op, yes, no, value in lines
    )
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(lines), ctypes.addressof(buffer))
    _checked(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program), 0, 0))
