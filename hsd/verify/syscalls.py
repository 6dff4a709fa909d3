"""The system calls that a sandboxed Python program may make, as a seccomp filter that libseccomp compiles.

A list of what is allowed, not of what is denied: calls of newer kernels (fchmodat2, setxattrat, ...) are not on it.
Without numbers: libseccomp knows them for each machine.
"""

from __future__ import annotations

import functools
import os
from typing import Any

ALLOWED = """
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek _llseek close close_range
open openat stat stat64 lstat lstat64 fstat fstat64 newfstatat fstatat64 statx access faccessat faccessat2
getdents getdents64 getcwd chdir fchdir readlink readlinkat statfs fstatfs umask fadvise64
dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait
epoll_pwait2 eventfd2 timerfd_create timerfd_settime timerfd_gettime
mmap mmap2 mprotect munmap mremap madvise brk msync mincore mseal
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause alarm
getitimer setitimer nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
futex futex_waitv futex_wake futex_wait set_robust_list get_robust_list set_tid_address rseq membarrier
restart_syscall arch_prctl getrandom
getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp capget
getrusage getrlimit ugetrlimit uname sysinfo getcpu
sched_yield sched_get_priority_max sched_get_priority_min
sendto recvfrom sendmsg recvmsg shutdown socketpair getsockname getpeername getsockopt
wait4 waitid exit exit_group
""".split()
CLONE_THREAD = 0x00010000
# With a process as the argument: 0, itself.
OWN = {
    "getpgid": 0,
    "getsid": 0,
    "getpriority": 1,
    "sched_getaffinity": 0,
    "sched_getparam": 0,
    "sched_getscheduler": 0,
}
# F_DUPFD, F_[GS]ETFD, F_[GS]ETFL, F_DUPFD_CLOEXEC; not F_SETOWN, F_SETSIG, F_SETLEASE, F_NOTIFY, and no locks: on a
# file of the Python installation one is seen by all programs, and by the trainer
FCNTL = (0, 1, 2, 3, 4, 1030)
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
PRCTL = (3, 15, 16, 21, 0x53564D41)  # PR_GET_DUMPABLE PR_SET_NAME PR_GET_NAME PR_GET_SECCOMP PR_SET_VMA
ENOSYS, EPERM = 38, 1
DENIED = ("fork", "vfork", "kill", "tkill", "tgkill", "execve", "socket", "setsid", "setpgid")  # in Python's own words


@functools.cache
def filter_program() -> bytes:
    """The filter as BPF; empty where libseccomp or its binding `pyseccomp` is missing. Made once a process."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError):
        return b""
    rules = seccomp.SyscallFilter(seccomp.ERRNO(ENOSYS))  # what a C library falls back from

    def add(action: int, name: str, *conditions: Any) -> None:
        try:
            rules.add_rule(action, name, *conditions)
        except (OSError, ValueError):  # libseccomp or this machine does not know the name: it stays denied
            pass

    for name in ALLOWED:
        add(seccomp.ALLOW, name)
    for name in DENIED:
        add(seccomp.ERRNO(EPERM), name)
    for name, values in (("fcntl", FCNTL), ("fcntl64", FCNTL), ("ioctl", IOCTL)):
        for value in values:
            add(seccomp.ALLOW, name, seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, value))
    for name, position in OWN.items():
        add(seccomp.ALLOW, name, seccomp.Arg(position, seccomp.MASKED_EQ, 0xFFFFFFFF, 0))
    for value in PRCTL:
        add(seccomp.ALLOW, "prctl", seccomp.Arg(0, seccomp.MASKED_EQ, 0xFFFFFFFF, value))
    add(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD))
    add(seccomp.ALLOW, "prlimit64", seccomp.Arg(0, seccomp.MASKED_EQ, 0xFFFFFFFF, 0))  # its own limits only
    with os.fdopen(os.memfd_create("hsd-filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
