"""Linux confinement of the calling process through ctypes: namespaces, Landlock, seccomp, limits, no privileges.

No library on the package index does this without a system library (pyseccomp needs libseccomp), a kernel newer than
most clusters have or a large binary of its own. Everything here raises `OSError` where the kernel refuses; who calls
decides what then. Only the standard library is imported: this runs in a fresh interpreter for every program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import struct

from reward_models.sandbox import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:  # so that it costs nothing at run time
    from collections.abc import Callable, Sequence

_LIBC = ctypes.CDLL(None, use_errno=True)

# linux/sched.h: mount, UTS, IPC, user, PID and network namespaces
_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
# The same numbers on every machine:
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SCRATCH = "/tmp"  # inside the new root, so no folder of the machine


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    return _check(_LIBC.syscall(ctypes.c_long(number), *arguments), what)


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends, however that ends."""
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Descendants whose parent has ended become children of this process."""
    _check(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int) -> None:
    """Hard limits of this process: CPU time, address space, size of a file, open files; no core dumps."""
    for what, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(what)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (allowed, allowed))


def drop_privileges() -> None:
    """No capabilities, none to be had by executing anything, and no other process may look into this one."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    _syscall(_SYS_CAPSET[os.uname().machine], "capset", header, nothing)


# -------------------------------------------------------------------------------------------------------------- files


def enter_namespaces() -> None:
    """User, mount, PID, network, IPC and UTS namespaces of our own. The next child is the first process of the PID
    namespace: when it ends, the kernel ends all others in it.
    """
    user, group = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(_NAMESPACES), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def enter_new_root(readable: Sequence[str], scratch_bytes: int) -> None:
    """Makes an empty root in memory: `readable` at their places, read-only, and a scratch folder of limited size, which
    becomes the working directory. Nothing else of the machine's files is there, not even /proc.
    """
    _mount(None, "/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: nothing of this is seen outside
    base = next(path for path in ("/tmp", "/var/tmp", "/mnt", "/dev/shm") if os.path.isdir(path))
    handles = {path: handle for path in readable if (handle := _path_handle(path)) is not None}
    _mount("tmpfs", base, "tmpfs", 0x2 | 0x4, "size=1m,mode=755")  # MS_NOSUID | MS_NODEV
    for path, handle in handles.items():
        _bind(handle, base + path)
    os.makedirs(base + SCRATCH, exist_ok=True)
    _set_read_only(base)
    _mount("tmpfs", base + SCRATCH, "tmpfs", 0x2 | 0x4 | 0x8, f"size={scratch_bytes},nr_inodes=1024,mode=700")
    os.chdir(base)
    _syscall(_SYS_PIVOT_ROOT[os.uname().machine], "pivot_root", b".", b".")
    _check(_LIBC.umount2(b".", 2), "umount2")  # MNT_DETACH: the old root, which lies over the new one
    os.chdir(SCRATCH)


def _bind(handle: int, place: str) -> None:
    path = f"/proc/self/fd/{handle}"  # by name it may lie under the new root by now
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o444))
    _mount(path, place, None, 0x1000 | 0x4000, None)  # MS_BIND | MS_REC
    os.close(handle)


def _path_handle(path: str) -> int | None:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # such as a folder only another user may enter
        return None


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {target}")


def _set_read_only(path: str) -> None:
    # struct mount_attr: MOUNT_ATTR_RDONLY | NOSUID | NODEV set, nothing cleared; with AT_RECURSIVE
    attributes = struct.pack("QQQQ", 0x1 | 0x2 | 0x4, 0, 0, 0)
    where = os.fsencode(path)
    _syscall(_SYS_MOUNT_SETATTR, "mount_setattr", -100, where, 0x8000, attributes, ctypes.c_size_t(len(attributes)))


def landlock_version() -> int:
    """Of the kernel's Landlock; 0 where there is none."""
    return max(_LIBC.syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1), 0)


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Landlock: files are opened under these paths only; no TCP; no abstract sockets of the outside.

    Its scope for signals is left out: it would also hold back the one that ends the program when its checker dies.
    """
    version = landlock_version()
    if not version:
        raise OSError("this kernel has no Landlock")
    # linux/landlock.h: 13 rights of version 1, then REFER, TRUNCATE, IOCTL_DEV
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15 if version >= 5 else 0)
    network, scope = (0x3 if version >= 4 else 0), (0x1 if version >= 6 else 0)
    attributes = struct.pack("QQQ", files, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    size = ctypes.c_size_t(len(attributes))
    rules = _syscall(_SYS_LANDLOCK_CREATE, "landlock_create_ruleset", attributes, size, 0)
    read_file, read_folder = 0x4, 0x8
    for path in readable:
        _allow(rules, path, read_file | read_folder)
    for path in writable:
        _allow(rules, path, files & ~0x1)  # all but EXECUTE
    _syscall(_SYS_LANDLOCK_RESTRICT, "landlock_restrict_self", rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    if (handle := _path_handle(path)) is None:
        return
    if not os.path.isdir(path):
        rights &= 0x4 | 0x2 | 0x4000  # READ_FILE, WRITE_FILE, TRUNCATE: what a rule on a file may have
    _syscall(_SYS_LANDLOCK_ADD, "landlock_add_rule", rules, 1, struct.pack("=Qi", rights, handle), 0)
    os.close(handle)


# ------------------------------------------------------------------------------------------------------------ seccomp


def restrict_syscalls() -> None:
    """seccomp: only the calls of `syscalls` work (EPERM for all others): no new processes or threads, no programs, no
    sockets but a pair of its own, no signals to others, no higher limits.
    """
    program = b"".join(_filter(os.uname().machine, os.getpid()))
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")  # SECCOMP_MODE_FILTER


def _conditions(pid: int) -> dict[str, tuple[int, list[int]]]:
    """Calls that are allowed only if the low half of an argument is one of these values."""
    return {
        "socketpair": (0, [1]),  # AF_UNIX: asyncio wakes itself through one
        "ioctl": (1, [0x5401, 0x5421, 0x541B, 0x5450, 0x5451]),  # TCGETS, FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
        # Without F_SETOWN and F_SETSIG, by which a pipe sends any signal to any process.
        "fcntl": (1, [0, 1, 2, 3, 4, 5, 6, 7, 1030]),
        "prlimit64": (2, [0]),  # only asking
        "tgkill": (0, [pid]),
    }


def _filter(machine: str, pid: int) -> list[bytes]:
    """Classic BPF over `struct seccomp_data` (number at 0, architecture at 4, arguments from 16)."""
    tables = {"x86_64": (0xC000003E, syscalls.X86_64), "aarch64": (0xC00000B7, syscalls.AARCH64)}
    if machine not in tables:
        raise OSError(f"no table of system calls for {machine}")
    architecture, numbers = tables[machine]
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_ALLOW, ERRNO | EPERM, KILL_PROCESS
    load, equal, result = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    program = [op(load, 4), op(equal, architecture, 1, 0), op(result, kill), op(load, 0)]
    conditions = _conditions(pid)
    for name, number in numbers.items():
        if name not in conditions:
            program += [op(equal, number, 0, 1), op(result, allow)]
    for name, (argument, values) in conditions.items():
        checks = [op(load, 16 + 8 * argument)]
        for value in values:
            checks += [op(equal, value, 0, 1), op(result, allow)]
        checks.append(op(result, refuse))
        program += [op(equal, numbers[name], 0, len(checks)), *checks]
    return [*program, op(result, refuse)]


# ------------------------------------------------------------------------------------------------------- all together


def confine(mode: str, readable: Sequence[str], limits: dict[str, int]) -> None:
    """Takes everything from this process that a program does not need.

    Args:
        mode: `namespaces` (this process is in a new root already), `landlock`, or `weak`, which goes on without what
            the kernel refuses.
        readable: files and folders that may be read.
        limits: `cpu_seconds`, `memory_bytes`, `file_bytes`, `open_files`.

    Raises:
        OSError: a part is not to be had, and `mode` is not `weak`.
    """
    in_root = mode == "namespaces"
    parts: list[Callable[[], None]] = [
        lambda: set_limits(**limits),
        drop_privileges,
        lambda: restrict_files(readable, [SCRATCH] if in_root else []),
        restrict_syscalls,
    ]
    if in_root and not landlock_version():
        del parts[2]  # the new root has nothing else in it
    for part in parts:
        with contextlib.suppress(OSError, KeyError) if mode == "weak" else contextlib.nullcontext():
            part()
