"""What runs in the sandbox's process: fences it in, runs the program, says how it went. Only the standard library.

Started by `sandbox.py` as a script, in an empty folder, with the program on standard input; it writes one JSON
document, `{"passed": ..., "reason": ...}`, to standard output.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

# <linux/sched.h>; `os.unshare` only exists from Python 3.12 on
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
# <linux/landlock.h>. Rights on files, as bits: to run, write, remove and make them; later versions know more of them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, of these numbers on every architecture
RUN, WRITE, CHANGE, RENAME, TRUNCATE = 1 << 0, 1 << 1, sum(1 << bit for bit in range(4, 13)), 1 << 13, 1 << 14
PR_SET_NO_NEW_PRIVS = 38  # <linux/prctl.h>

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SEMAPHORES = "/dev/shm"  # glibc makes them there; those of `ThreadPool` are removed at once
LARGEST_FILE, LARGEST_FOLDER = 16 * 2**20, 64 * 2**20  # bytes
REASON_LENGTH = 200  # characters

# Audit events of Python. Processes would outlive the program, and neither they nor interpreters obey the audit hook.
REFUSED = {
    "cpython.PyInterpreterState_New", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg",
    "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "resource.prlimit", "subprocess.Popen",
}  # fmt: skip
# Events that begin with these: calls into compiled libraries, and connections.
REFUSED_KINDS = ("ctypes.", "socket.")
# A socket that is not connected does no harm, and asyncio makes a pair of them.
HARMLESS = {"socket.__new__"}
# Ways into compiled libraries without events. `_ctypes` is loaded by now; anew it would have all its functions.
REFUSED_MODULES = {"_cffi_backend", "_ctypes", "_ctypes_test", "_testcapi", "_testinternalcapi"}
# Functions, and addresses of functions, that would make processes, write into memory, or change other processes or
# files outside the folder, and raise no event.
WITHOUT_EVENT = {
    "_posixsubprocess": ["fork_exec"],
    "posix": ["mkfifo", "mknod", "sched_setaffinity", "sched_setparam", "sched_setscheduler", "setpriority"],
    "_signal": ["pidfd_send_signal"],
    "ctypes": ["memmove", "memset", "_memmove_addr", "_memset_addr"],
    "_ctypes": ["_cast_addr", "_memmove_addr", "_memset_addr", "_string_at_addr", "_wstring_at_addr"],
}
# Events that change what a path names, and how many folders (`dir_fd`) their last arguments name.
CHANGING = {
    "os.chflags": 0, "os.chmod": 1, "os.chown": 1, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.removexattr": 0,
    "os.rename": 2, "os.rmdir": 1, "os.setxattr": 0, "os.symlink": 1, "os.truncate": 0, "os.utime": 1,
    "shutil.rmtree": 0, "sqlite3.connect": 0,
}  # fmt: skip


def main() -> None:
    """`runner.py MEMORY SECONDS`: mebibytes of address space, and seconds of processor time."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    program = sys.stdin.buffer.read().decode()
    folder = os.getcwd()
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    libc = ctypes.CDLL(None)
    enter_namespaces(libc, folder)
    restrict_kernel(libc, folder)
    for limit, value in (
        (resource.RLIMIT_AS, memory * 2**20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # Should the process that watches the clock be killed, this one does not stay.
    signal.alarm(2 * seconds)
    replace_functions()
    sys.addaudithook(make_guard(folder))
    # The program can replace functions of modules, but not what is bound here.
    encode, write, leave = json.dumps, os.write, os._exit
    failure = run(program)
    write(verdict, encode({"passed": failure is None, "reason": "passed" if failure is None else failure}).encode())
    leave(0)  # threads of the program may still run


def enter_namespaces(libc: Any, folder: str) -> bool:
    """Gives the process a network without interfaces, and small folders in memory that vanish with it.

    Returns:
        False where the kernel does not allow both; the folders on disk are used then.
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS):
        return False
    # Without a name for the user, no file could be made in the new folder.
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    try:
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    options = b"mode=700,size=%d" % LARGEST_FOLDER
    # With `TMPDIR=/dev/shm` the second would hide the first.
    paths = [folder] if folder.startswith(SEMAPHORES) else [folder, SEMAPHORES]
    failed = [libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options) for path in paths]
    os.chdir(folder)
    return not any(failed)


def restrict_kernel(libc: Any, folder: str) -> bool:
    """Lets the kernel refuse what the audit hook does not see: a Landlock domain.

    In it nothing outside the folder and that of semaphores can be made, written, renamed or removed, and no program be
    run; kernels from 6.7 on refuse TCP as well, and from 6.12 on signals to other processes.

    Returns:
        False if the kernel has no Landlock.
    """
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = RUN | WRITE | CHANGE | (RENAME if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    network, scopes = 3 if version >= 4 else 0, 3 if version >= 6 else 0
    domain = struct.pack("=QQQ", rights, network, scopes)
    ruleset = libc.syscall(CREATE_RULESET, domain, len(domain), 0)
    for path, allowed in ((folder, rights & ~RUN), (SEMAPHORES, rights & ~RUN), (os.devnull, WRITE)):
        if not os.path.exists(path):
            continue
        file = os.open(path, os.O_PATH)
        failed = libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, file), 0)
        os.close(file)
        if failed:
            return False
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    failed = libc.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
    return not failed


def replace_functions() -> None:
    """Puts functions that refuse in the place of those that raise no audit event."""

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*arguments: Any, **options: Any) -> Any:
            raise PermissionError(f"the sandbox refuses `{name}`")

        return refuse

    for module, names in WITHOUT_EVENT.items():
        for name in names:
            # `os` and `signal` have names of their own for them.
            for place in (import_module(module), os, signal):
                if hasattr(place, name):
                    setattr(place, name, refusing(name))


def make_guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses processes, connections, and changes of files outside the folder."""
    # Bound here, for the same reason.
    resolve, decode, join, read_link, error = os.path.realpath, os.fsdecode, os.path.join, os.readlink, PermissionError
    inside = resolve(folder) + os.sep

    def check_path(event: str, path: Any, relative_to: int = -1) -> None:
        if isinstance(path, int):
            path, relative_to = "", path
        base = read_link(f"/proc/self/fd/{relative_to}") if relative_to >= 0 else ""
        path = resolve(join(base, decode(path)))
        if not f"{path}/".startswith(inside) and path != os.devnull:
            raise error(f"the sandbox refuses to change `{path}`, which is outside its folder ({event})")

    def check_import(name: str, path: Any) -> None:
        # A loader may call a module otherwise. A compiled one in the folder was put there by the program.
        file = resolve(path) if isinstance(path, (str, bytes)) else ""
        names = {name, decode(file).split("/")[-1].split(".")[0]}
        if names & REFUSED_MODULES or decode(file).startswith(inside):
            raise error(f"the sandbox refuses to import `{name}`")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REFUSED or (event.startswith(REFUSED_KINDS) and event not in HARMLESS):
            raise error(f"the sandbox refuses `{event}`")
        if event == "import":
            check_import(*arguments[:2])
        if event == "open" and not isinstance(arguments[0], int) and arguments[2] & WRITING:
            check_path(event, arguments[0])  # of `os.open(..., dir_fd=...)` the event does not say the folder
        elif event in CHANGING:
            count = CHANGING[event]
            folders = arguments[len(arguments) - count :]
            paths = [path for path in arguments[1:2] if isinstance(path, (str, bytes))]  # the second of two
            for number, path in enumerate([arguments[0], *paths]):
                check_path(event, path, folders[min(number, count - 1)] if count else -1)

    return guard


def run(program: str) -> str | None:
    """Runs a program as a module; returns what went wrong, or None."""
    # Not `__main__`, so that a solution's own script part stays out; a module, because dataclasses look for theirs.
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # also SystemExit: a program that ends itself has not passed
        text = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__}"
        return text[:REASON_LENGTH]
    return None


if __name__ == "__main__":
    main()
