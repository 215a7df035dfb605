"""Numbers of the system calls that a confined Python needs, per machine; from the kernel's asm/unistd headers."""

from __future__ import annotations

# Nothing here makes a process or a thread, opens a socket to anywhere, or reaches another process.
# fmt: off
X86_64 = {
    "read": 0, "write": 1, "readv": 19, "writev": 20, "pread64": 17, "pwrite64": 18, "preadv": 295, "pwritev": 296,
    "close": 3, "close_range": 436, "lseek": 8, "fstat": 5, "stat": 4, "lstat": 6, "newfstatat": 262, "statx": 332,
    "open": 2, "openat": 257, "access": 21, "faccessat": 269, "faccessat2": 439, "readlink": 89, "readlinkat": 267,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "getdents": 78, "getdents64": 217, "mkdir": 83, "mkdirat": 258,
    "rmdir": 84, "unlink": 87, "unlinkat": 263, "rename": 82, "renameat": 264, "renameat2": 316, "symlink": 88,
    "symlinkat": 266, "truncate": 76, "ftruncate": 77, "fsync": 74, "fdatasync": 75, "fadvise64": 221, "umask": 95,
    "dup": 32, "dup2": 33, "dup3": 292, "pipe": 22, "pipe2": 293, "poll": 7, "ppoll": 271, "select": 23,
    "pselect6": 270, "epoll_create1": 291, "epoll_ctl": 233, "epoll_wait": 232, "epoll_pwait": 281, "eventfd2": 290,
    "fcntl": 72, "flock": 73, "ioctl": 16, "copy_file_range": 326, "sendfile": 40, "mmap": 9, "munmap": 11,
    "mremap": 25, "mprotect": 10, "madvise": 28, "brk": 12, "membarrier": 324, "msync": 26, "rt_sigaction": 13,
    "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130,
    "sigaltstack": 131, "tgkill": 234, "setitimer": 38, "getitimer": 36, "alarm": 37, "pause": 34, "nanosleep": 35,
    "clock_nanosleep": 230, "clock_gettime": 228, "clock_getres": 229, "gettimeofday": 96, "time": 201,
    "times": 100, "getpid": 39, "gettid": 186, "getppid": 110, "getuid": 102, "geteuid": 107, "getgid": 104,
    "getegid": 108, "getresuid": 118, "getresgid": 120, "getgroups": 115, "getpgrp": 111, "getpgid": 121,
    "getsid": 124, "uname": 63, "sysinfo": 99, "getrusage": 98, "getrlimit": 97, "prlimit64": 302, "getcpu": 309,
    "sched_yield": 24, "sched_getaffinity": 204, "getrandom": 318, "futex": 202, "set_robust_list": 273,
    "get_robust_list": 274, "rseq": 334, "set_tid_address": 218, "arch_prctl": 158, "exit": 60, "exit_group": 231,
    "restart_syscall": 219, "wait4": 61, "waitid": 247, "socketpair": 53, "sendto": 44, "recvfrom": 45,
    "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55,
}
AARCH64 = {
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70,
    "close": 57, "close_range": 436, "lseek": 62, "fstat": 80, "newfstatat": 79, "statx": 291, "openat": 56,
    "faccessat": 48, "faccessat2": 439, "readlinkat": 78, "getcwd": 17, "chdir": 49, "fchdir": 50, "getdents64": 61,
    "mkdirat": 34, "unlinkat": 35, "renameat": 38, "renameat2": 276, "symlinkat": 36, "truncate": 45,
    "ftruncate": 46, "fsync": 82, "fdatasync": 83, "fadvise64": 223, "umask": 166, "dup": 23, "dup3": 24,
    "pipe2": 59, "ppoll": 73, "pselect6": 72, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22,
    "eventfd2": 19, "fcntl": 25, "flock": 32, "ioctl": 29, "copy_file_range": 285, "sendfile": 71, "mmap": 222,
    "munmap": 215, "mremap": 216, "mprotect": 226, "madvise": 233, "brk": 214, "membarrier": 283, "msync": 227,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigpending": 136, "rt_sigtimedwait": 137,
    "rt_sigsuspend": 133, "sigaltstack": 132, "tgkill": 131, "setitimer": 103, "getitimer": 102, "nanosleep": 101,
    "clock_nanosleep": 115, "clock_gettime": 113, "clock_getres": 114, "gettimeofday": 169, "times": 153,
    "getpid": 172, "gettid": 178, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177,
    "getresuid": 148, "getresgid": 150, "getgroups": 158, "getpgid": 155, "getsid": 156, "uname": 160,
    "sysinfo": 179, "getrusage": 165, "getrlimit": 163, "prlimit64": 261, "getcpu": 168, "sched_yield": 124,
    "sched_getaffinity": 123, "getrandom": 278, "futex": 98, "set_robust_list": 99, "get_robust_list": 100,
    "rseq": 293, "set_tid_address": 96, "exit": 93, "exit_group": 94, "restart_syscall": 128, "wait4": 260,
    "waitid": 95, "socketpair": 199, "sendto": 206, "recvfrom": 207, "shutdown": 210, "getsockname": 204,
    "getpeername": 205, "getsockopt": 209,
}
