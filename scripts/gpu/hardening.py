"""systemd's hardening settings, put by a process on itself where there is no systemd; then it becomes a command.

    python scripts/gpu/hardening.py NoNewPrivileges=yes 'SystemCallFilter=@system-service' -- id

Each is done as systemd 252 does it (namespaces, capabilities, seccomp filters), in an order that lets the next one be
done too, and is then tested: what cannot be put on, or does not bite, ends it with one line. Knows x86-64, root, and
the values that our units have. syscalls.txt beside it is what this prints on a machine with systemd and libseccomp:

    python scripts/gpu/hardening.py --syscalls > scripts/gpu/syscalls.txt
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import mmap
import os
import pwd
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

SYSCALLS_FILE = Path(__file__).with_name("syscalls.txt")

LIBC = ctypes.CDLL(None, use_errno=True)

SAYS = "hardening: "
"""What its own errors begin with."""

TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108, the places that PrivateTmp= hides
HOMES = ("/home", "/root", "/run/user")

Argument = int | bytes | None


def call(function: str, *arguments: Argument) -> int:
    """A function of libc's; OSError where it returns -1."""
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    result: int = getattr(LIBC, function)(*words)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{function}()")
    return result


def syscall(name: str, *arguments: Argument) -> int:
    return call("syscall", numbers()[name], *arguments)


def refused(name: str, *arguments: Argument) -> bool:
    """Whether a filter or a missing capability forbids it; with arguments that do no harm where nothing does."""
    try:
        syscall(name, *arguments)
    except OSError as error:
        return error.errno in {errno.EPERM, errno.EAFNOSUPPORT, errno.ENOSYS}
    return False


# System calls by name: systemd's sets, and this processor's numbers.


@functools.cache
def sets() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in SYSCALLS_FILE.read_text().splitlines():
        for word in () if line.startswith("#") else line.split():
            if word.endswith(":"):
                members = found.setdefault(word[:-1], [])
            else:
                members.append(word)
    return found


@functools.cache
def numbers() -> dict[str, int]:
    return {name: int(number) for name, _, number in (word.partition("=") for word in sets()["numbers"])}


def named(words: Iterable[str]) -> set[int]:
    """Numbers of the calls and sets named; this processor lacks some of them."""
    found: set[int] = set()
    for word in words:
        if word.startswith("@"):
            found |= named(sets()[word])
        elif word in numbers():
            found.add(numbers()[word])
    return found


def print_syscalls() -> None:
    said = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    members: dict[str, list[str]] = {}
    for line in said.splitlines():
        word = line.strip()
        if line.startswith("@"):
            members[word] = []
        elif word and not word.startswith("#"):
            members[next(reversed(members))].append(word)
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name
    known = ((name, resolve(name.encode())) for name in members["@known"])
    members["numbers"] = [f"{name}={number}" for name, number in known if number >= 0]
    version = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"# {' '.join(version.split()[:2])}: its sets of system calls, and their numbers on {os.uname().machine}")
    for name, words in members.items():
        print(textwrap.fill(f"{name}: {' '.join(words)}", 120, subsequent_indent="  ", break_on_hyphens=False))


# seccomp: a filter is a program of the kernel's small packet-filter machine; hand-made, so that no library is needed.

_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X86_64 = 0xC000003E
_X32 = 0x40000000

Program = list[tuple[int, int, int, int]]


def _argument(index: int) -> tuple[int, int, int, int]:
    return (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * index)


def always(error: int = errno.EPERM) -> Program:
    return [(_RETURN, 0, 0, _ERROR | error)]


def where_all_set(index: int, *flags: int, error: int = errno.EPERM) -> Program:
    """Refused if an argument has every bit of one of ``flags``."""
    program: Program = []
    for flag in flags:
        program += [_argument(index), (_AND, 0, 0, flag), (_IF_EQUAL, 0, 1, flag), (_RETURN, 0, 0, _ERROR | error)]
    return program


def where_none_of(index: int, *values: int, error: int = errno.EPERM) -> Program:
    """Refused if an argument is none of ``values``."""
    tests = [(_IF_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_argument(index), *tests, (_RETURN, 0, 0, _ERROR | error)]


def refuse(rules: Mapping[str, Program]) -> None:
    """Load a filter that lets every call through but those that its rule refuses."""
    program: Program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for name, rule in rules.items():
        program += [(_LOAD, 0, 0, _NUMBER), (_IF_EQUAL, 0, len(rule), numbers()[name]), *rule]
    _load([*program, (_RETURN, 0, 0, _ALLOW)])


def _in_any(chosen: Iterable[int], result: int) -> Program:
    """``result`` for each number chosen, in runs: most sets are a few."""
    program: Program = []
    runs: list[tuple[int, int]] = []
    for number in sorted(chosen):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    for first, last in runs:
        program += [(_IF_AT_LEAST, 0, 2, first), (_IF_AT_LEAST, 1, 0, last + 1), (_RETURN, 0, 0, result)]
    return program


def _load(program: Program) -> None:
    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_char_p))

    words = b"".join(struct.pack("=HBBI", code, yes, no, value) for code, yes, no, value in program)
    set_seccomp, filter_mode = 22, 2
    loaded = Filter(len(program), words)
    call("prctl", set_seccomp, filter_mode, ctypes.addressof(loaded), 0, 0)


# Mounts, in a namespace of this process's own.

_BIND, _RECURSIVE, _MOVE, _PRIVATE, _READ_ONLY = 1 << 12, 1 << 14, 1 << 13, 1 << 18, 1
_NO_EXTRAS = 2 | 4 | 8  # nosuid, nodev, noexec


@functools.cache
def own_mounts() -> None:
    call("unshare", 0x20000)
    call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)


def mount(source: str, target: str | Path, kind: str | None, flags: int = 0, options: str = "") -> None:
    own_mounts()
    call("mount", source.encode(), str(target).encode(), kind.encode() if kind else None, flags, options.encode())


def bind(source: str | Path, target: str | Path) -> None:
    mount(str(source), target, None, _BIND | _RECURSIVE)


def set_read_only(point: str, *, with_those_below: bool) -> None:
    attributes = struct.pack("=QQQQ", 1, 0, 0, 0)
    at_working_directory, below = -100, 0x8000
    syscall(
        "mount_setattr", at_working_directory, point.encode(), below * with_those_below, attributes, len(attributes)
    )


def read_only(*paths: str) -> None:
    for path in paths:
        if Path(path).exists():
            bind(path, path)
            set_read_only(path, with_those_below=True)


def inaccessible(*paths: str) -> None:
    for path in paths:
        if Path(path).is_dir():
            mount("tmpfs", path, "tmpfs", _READ_ONLY | _NO_EXTRAS, "mode=000")
        elif Path(path).exists():
            with tempfile.NamedTemporaryFile() as empty:
                os.fchmod(empty.fileno(), 0)
                bind(empty.name, path)


def mount_points() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4].encode().decode("unicode_escape") for line in lines]


def options_of(point: str) -> str:
    """Of the file system that is seen there: the one mounted last."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4] == point][-1]


def is_below(path: str, above: Iterable[str]) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in above)


# The settings. Each takes the values that the unit has for it, in order, and the directories that are the service's.


def protect_system(values: Sequence[str], own: Sequence[str]) -> None:
    _only(values, "strict")
    # PrivateTmp is a setting of its own; without it systemd would leave no temporary directory to write to.
    writable = [*own, *(path for path in TEMPORARY if Path(path).exists())]
    spared = ["/dev", "/proc", "/sys", *writable]
    own_mounts()
    for path in writable:
        bind(path, path)
    for point in mount_points():
        if not is_below(point, spared):
            # One below a mount point that another mount hides is not there to be found.
            with suppress(FileNotFoundError):
                set_read_only(point, with_those_below=False)


def protect_home(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    inaccessible(*HOMES)


def homes_are_empty() -> bool:
    def empty(home: Path) -> bool:
        try:
            return not home.exists() or not list(home.iterdir())
        except PermissionError:
            return True

    return all(empty(Path(home)) for home in HOMES)


def private_tmp(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    for path in TEMPORARY:
        if Path(path).exists():
            mount("tmpfs", path, "tmpfs", 2 | 4, "mode=1777")


def protect_proc(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "invisible")
    mount("proc", "/proc", "proc", _NO_EXTRAS, "hidepid=invisible")


def proc_subset(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "pid")
    mount("proc", "/proc", "proc", _NO_EXTRAS, "subset=pid")


def protect_kernel_tunables(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    inaccessible("/proc/kallsyms", "/proc/kcore")
    names = "acpi apm asound bus fs irq latency_stats mtrr scsi sys sysrq-trigger timer_stats"
    read_only(*(f"/proc/{name}" for name in names.split()), "/sys")


def protect_kernel_modules(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    inaccessible("/usr/lib/modules")
    _drop_capabilities(16)
    refuse({name: always() for name in sets()["@module"]})


def protect_kernel_logs(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    inaccessible("/dev/kmsg", "/proc/kmsg")
    _drop_capabilities(34)
    refuse({"syslog": always()})


def protect_control_groups(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    read_only("/sys/fs/cgroup")


def protect_clock(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    _drop_capabilities(25, 35)
    refuse({name: always() for name in sets()["@clock"] if name in numbers()})


def protect_hostname(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    call("unshare", 0x04000000)
    refuse({"sethostname": always(), "setdomainname": always()})


def devices(values: Sequence[str], _own: Sequence[str]) -> None:
    """A /dev of the nodes that DevicePolicy=closed and DeviceAllow= let it open, in place of a control group."""
    _, *allowed = values
    kinds = [value.removeprefix("char-").removesuffix(" rw") for value in allowed]
    listed, _, _ = Path("/proc/devices").read_text().partition("Block devices:")
    majors = {
        int(major)
        for major, name in (line.split() for line in listed.splitlines() if line and line[-1] != ":")
        if any(fnmatch.fnmatch(name, kind) for kind in kinds)
    }
    nodes = {
        path for path in Path("/dev").rglob("*") if path.is_char_device() and os.major(path.stat().st_rdev) in majors
    }
    _replace_dev(nodes)


def private_devices(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    _replace_dev(())
    _drop_capabilities(17, 27)


def _replace_dev(nodes: Iterable[Path]) -> None:
    standard = [Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom", "tty")]
    directories = [Path("/dev") / name for name in ("shm", "mqueue", "hugepages", "pts")]
    stage = Path(tempfile.mkdtemp())
    mount("tmpfs", stage, "tmpfs", 2 | 8, "mode=755")
    for path in (path for path in (*standard, *directories, *nodes) if path.exists()):
        place = stage / path.relative_to("/dev")
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            place.mkdir()
        else:
            place.touch()
        bind(path, place)
    for name, target in {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1"}.items():
        (stage / name).symlink_to(target)
    mount(str(stage), "/dev", None, _MOVE)
    stage.rmdir()


def only_common_devices() -> bool:
    found = [path.stat().st_mode for path in Path("/dev").rglob("*") if path.exists()]
    return not Path("/dev/kmsg").exists() and not any(stat.S_ISBLK(mode) for mode in found)


def private_users(values: Sequence[str], _own: Sequence[str]) -> None:
    """Root and the service's user are themselves, and everyone else is nobody."""
    _only(values, "yes")
    parent = os.getpid()
    ready, say_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(ready, 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{parent}/{name}").write_text(f"0 0 1\n{free_uid()} {free_uid()} 1\n")
        os._exit(0)
    call("unshare", 0x10000000)
    os.write(say_ready, b"!")
    if os.waitpid(child, 0)[1]:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), "uid_map")


def umask(values: Sequence[str], _own: Sequence[str]) -> None:
    os.umask(int(values[-1], 8))


def capabilities(values: Sequence[str], _own: Sequence[str]) -> None:
    """No capability in the bounding set or the ambient one, so the command has none, though it were root's."""
    _only(values, "")
    _drop_capabilities(*range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1))
    ambient, clear_all = 47, 4
    call("prctl", ambient, clear_all, 0, 0, 0)


def _drop_capabilities(*which: int) -> None:
    drop_from_bounding_set = 24
    for capability in which:
        call("prctl", drop_from_bounding_set, capability, 0, 0, 0)


def free_uid() -> int:
    """One that DynamicUser= could take: systemd's range, and nobody's here."""
    taken = {user.pw_uid for user in pwd.getpwall()}
    return next(uid for uid in range(61184, 65520) if uid not in taken)


def user(_values: Sequence[str], _own: Sequence[str]) -> None:
    uid = free_uid()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_new_privileges(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    call("prctl", 38, 1, 0, 0, 0)


def lock_personality(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    refuse({"personality": where_none_of(0, call("personality", 0xFFFFFFFF), 0xFFFFFFFF)})


def restrict_namespaces(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    kinds = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
    rule = where_all_set(0, *kinds)
    # A filter cannot see the flags of clone3; libc falls back to clone.
    refuse({"unshare": rule, "clone": rule, "clone3": always(errno.ENOSYS), "setns": always()})


def restrict_realtime(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    refuse({"sched_setscheduler": where_none_of(1, os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)})


def restrict_suid_sgid(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    mode_of = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2, "creat": 1}
    rules = {name: where_all_set(index, stat.S_ISUID, stat.S_ISGID) for name, index in mode_of.items()}
    # Only where it makes a file does open take a mode; nothing of ours passes one with those bits otherwise.
    rules |= {
        "open": where_all_set(2, stat.S_ISUID, stat.S_ISGID),
        "openat": where_all_set(3, stat.S_ISUID, stat.S_ISGID),
    }
    refuse(rules | {"openat2": always(errno.ENOSYS)})


def restrict_address_families(values: Sequence[str], _own: Sequence[str]) -> None:
    families = [int(getattr(socket, name)) for value in values for name in value.split()]
    refuse({"socket": where_none_of(0, *families, error=errno.EAFNOSUPPORT)})


def refuses_netlink() -> bool:
    return refused("socket", socket.AF_NETLINK, socket.SOCK_RAW, 0)


def memory_deny_write_execute(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "yes")
    executable = where_all_set(2, mmap.PROT_EXEC)
    refuse(
        {
            "mmap": where_all_set(2, mmap.PROT_WRITE | mmap.PROT_EXEC),
            "mprotect": executable,
            "pkey_mprotect": executable,
            "shmat": where_all_set(2, 0o100000),
        }
    )


def refuses_writable_code() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except PermissionError:
        return True
    return False


def system_call_architectures(values: Sequence[str], _own: Sequence[str]) -> None:
    _only(values, "native")
    _load(
        [
            (_LOAD, 0, 0, _ARCHITECTURE),
            (_IF_EQUAL, 0, 2, _X86_64),
            (_LOAD, 0, 0, _NUMBER),
            (_IF_AT_LEAST, 0, 1, _X32),
            (_RETURN, 0, 0, _KILL),
            (_RETURN, 0, 0, _ALLOW),
        ]
    )


def kills_foreign_calls() -> bool:
    child = os.fork()
    if child == 0:
        call("prctl", 4, 0, 0, 0, 0)  # leaves no core file
        with suppress(OSError):
            call("syscall", _X32 | numbers()["getpid"])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSYS


def system_call_filter(values: Sequence[str], _own: Sequence[str]) -> None:
    """A list of what is allowed, or of what is not (~), as its first value says; @default is always allowed."""
    allows = not values[0].startswith("~")
    chosen = named(["@default"]) if allows else set()
    for value in values:
        inverted = value.startswith("~")
        if inverted is allows:
            chosen -= named(value.removeprefix("~").split())
        else:
            chosen |= named(value.removeprefix("~").split())
    native = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _NUMBER),
    ]
    listed, other = (_ALLOW, _ERROR | errno.EPERM) if allows else (_ERROR | errno.EPERM, _ALLOW)
    _load([*native, *_in_any(chosen, listed), (_RETURN, 0, 0, other)])


def _only(values: Sequence[str], *known: str) -> None:
    if unknown := set(values) - set(known):
        msg = f"the value {' '.join(sorted(unknown))!r} is not known here"
        raise ValueError(msg)


def status(key: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


@dataclass(frozen=True)
class Setting:
    how: str
    put_on: Callable[[Sequence[str], Sequence[str]], None]
    bites: Callable[[], bool]
    with_key: str | None = None
    """Another key of the unit that it is put on with."""


# In the order in which they are put on: mounts need root, filters need root or NoNewPrivileges.
SETTINGS = {
    "UMask": Setting("umask()", umask, lambda: int(status("Umask"), 8) & 0o007 == 0o007),
    "DevicePolicy": Setting(
        "a /dev with the nodes it may open alone, in place of a cgroup", devices, only_common_devices, "DeviceAllow"
    ),
    "PrivateDevices": Setting("a /dev of null, zero, random and the like", private_devices, only_common_devices),
    "ProtectSystem": Setting(
        "all read-only but /dev /proc /sys, /tmp and its own",
        protect_system,
        lambda: not os.access("/etc", os.W_OK),
    ),
    "ProtectHome": Setting("empty /home /root /run/user", protect_home, homes_are_empty),
    "PrivateTmp": Setting("a tmpfs on /tmp and /var/tmp", private_tmp, lambda: not list(Path(TEMPORARY[0]).iterdir())),
    "ProtectProc": Setting("a new /proc, hidepid=invisible", protect_proc, lambda: "hidepid" in options_of("/proc")),
    "ProcSubset": Setting("a new /proc, subset=pid", proc_subset, lambda: not Path("/proc/meminfo").exists()),
    "ProtectKernelTunables": Setting(
        "/proc/sys and its like, and /sys, read-only",
        protect_kernel_tunables,
        lambda: not os.access("/proc/sys/kernel/pid_max", os.W_OK),
    ),
    "ProtectControlGroups": Setting(
        "/sys/fs/cgroup read-only", protect_control_groups, lambda: not os.access("/sys/fs/cgroup", os.W_OK)
    ),
    "ProtectKernelModules": Setting(
        "seccomp, and no /usr/lib/modules", protect_kernel_modules, lambda: refused("delete_module", b"", 0)
    ),
    "ProtectKernelLogs": Setting("seccomp, and no /dev/kmsg", protect_kernel_logs, lambda: refused("syslog", 10, 0, 0)),
    "ProtectClock": Setting("seccomp", protect_clock, lambda: refused("clock_settime", 0, 0)),
    "ProtectHostname": Setting("a UTS namespace, seccomp", protect_hostname, lambda: refused("sethostname", 0, -1)),
    "PrivateUsers": Setting(
        "a user namespace of root and itself",
        private_users,
        lambda: len(Path("/proc/self/uid_map").read_text().splitlines()) == 2,
    ),
    "LockPersonality": Setting("seccomp", lock_personality, lambda: refused("personality", 8)),
    "RestrictNamespaces": Setting("seccomp", restrict_namespaces, lambda: refused("unshare", 0x04000000)),
    "RestrictRealtime": Setting(
        "seccomp", restrict_realtime, lambda: refused("sched_setscheduler", 0, os.SCHED_FIFO, 0)
    ),
    "RestrictSUIDSGID": Setting("seccomp", restrict_suid_sgid, lambda: refused("fchmod", -1, 0o4755)),
    "RestrictAddressFamilies": Setting("seccomp", restrict_address_families, refuses_netlink),
    "MemoryDenyWriteExecute": Setting("seccomp", memory_deny_write_execute, refuses_writable_code),
    "SystemCallArchitectures": Setting("seccomp", system_call_architectures, kills_foreign_calls),
    "CapabilityBoundingSet": Setting(
        "no capability in the bounding or ambient set",
        capabilities,
        lambda: int(status("CapBnd"), 16) == 0,
        "AmbientCapabilities",
    ),
    "User": Setting(f"setuid() to {free_uid()}, which has no name", user, lambda: os.getuid() == free_uid()),
    "NoNewPrivileges": Setting("prctl()", no_new_privileges, lambda: status("NoNewPrivs") == "1"),
    "SystemCallFilter": Setting(
        "seccomp", system_call_filter, lambda: refused("pivot_root", 0, 0) or refused("migrate_pages", 0, 0, 0, 0)
    ),
}


def grouped(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Settings that ``lines`` (KEY=VALUE) ask for and their values, in the order in which they are put on."""
    values: dict[str, list[str]] = {}
    for line in lines:
        key, _, value = line.partition("=")
        values.setdefault(key, []).append(value)
    for key, setting in SETTINGS.items():
        if key in values:
            yield key, values[key] + values.get(setting.with_key or "", [])


def main() -> None:
    if sys.argv[1:] == ["--syscalls"]:
        print_syscalls()
        return
    middle = sys.argv.index("--")
    lines, command = sys.argv[1:middle], sys.argv[middle + 1 :]
    own = [line.removeprefix("own=") for line in lines if line.startswith("own=")]
    asked = list(grouped(lines))
    os.chdir("/")
    # Read before a setting may hide it.
    numbers()
    try:
        for line in lines:
            if line.startswith("cgroup="):
                (Path(line.removeprefix("cgroup=")) / "cgroup.procs").write_text(str(os.getpid()))
        for key, values in asked:
            SETTINGS[key].put_on(values, own)
        idle = [key for key, _ in asked if not SETTINGS[key].bites()]
    except (OSError, ValueError) as error:
        sys.exit(f"{SAYS}cannot: {error}")
    if idle:
        sys.exit(f"{SAYS}does not bite: {' '.join(idle)}")
    os.execvp(command[0], command)  # noqa: S606, to become it is what this is for


if __name__ == "__main__":
    main()
