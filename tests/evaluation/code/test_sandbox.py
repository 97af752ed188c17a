"""The sandbox: what passes, what is stopped, and that nothing stays behind."""

import ctypes
import os
import subprocess
import time
from pathlib import Path

import pytest

from relay_hf.evaluation.code import sandbox
from relay_hf.evaluation.code.sandbox import Limits, run_program

SHORT = Limits(seconds=1.0)
PROBE = "unshare --user --map-root-user --net --mount mount -t tmpfs tmpfs /dev/shm"
NAMESPACES = not subprocess.run(PROBE.split(), capture_output=True).returncode
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: 'int'\nassert Point(1).x == 1",
        "if __name__ == '__main__':\n    raise SystemExit",
        "print('é' * 10**6)",
        "open('note', 'w').write('a')\nassert open('note').read() == 'a'",
        "import tempfile\nwith tempfile.TemporaryDirectory() as folder:\n    open(folder + '/a', 'w').write('x')",
        "from multiprocessing.pool import ThreadPool\nassert ThreadPool(2).map(str, [1]) == ['1']",
        "import asyncio\nasync def f():\n    return 3\nassert asyncio.run(f()) == 3",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    ],
)
def test_honest_program_passes(program: str) -> None:
    assert run_program(program, Limits(seconds=20.0)) == sandbox.Outcome(True, "passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'wrong'", "AssertionError: wrong"),
        ("def f(:", "SyntaxError"),
        ("x = '\0'", "S"),  # a SyntaxError, or up to Python 3.11 another error
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "no verdict: the program ended itself"),
        ("import os\nfor fd in range(3, 6):\n    try: os.write(fd, b'{}')\n    except OSError: pass", "no verdict"),
        ("import json\njson.dumps = lambda _: '{\"passed\": true, \"reason\": \"\"}'\nassert False", "AssertionError"),
        ("import os\nos.write = lambda *_: None\nassert False", "AssertionError"),
        ("import os\nfor fd in 3, 4, 5:\n    try: os.write(fd, b'[' * 4096)\n    except OSError: pass", "no verdict"),
        ("import os\nfor _ in range(99):\n    for fd in range(3, 6):\n        try: os.write(fd, bytes(2**20))\n"
         "        except OSError: pass", "no verdict"),
        ("import os\nos.abort()", "killed by SIGABRT"),
        ("x = bytearray(10**11)", "MemoryError"),
        ("x = []\nwhile True: x.append(bytearray(2**24))", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**25))", "OSError: [Errno 27] File too large"),
        ("import os\nos.fork()", "PermissionError: the sandbox refuses `os.fork`"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError: the sandbox refuses `subprocess.Popen`"),
        ("import os\nos.system('true')", "PermissionError: the sandbox refuses `os.system`"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError: the sandbox refuses `os.kill`"),
        ("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))",
         "PermissionError: the sandbox refuses `resource.prlimit`"),
        ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
         "PermissionError: the sandbox refuses `setpriority`"),
        ("import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
         "PermissionError: the sandbox refuses `fork_exec`"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "PermissionError: the sandbox refuses `socket."),
        ("import socket\nsocket.socket().bind(('', 0))", "PermissionError: the sandbox refuses `socket.bind`"),
    ],
)  # fmt: skip
def test_bad_program_fails_and_says_why(program: str, reason: str) -> None:
    outcome = run_program(program, Limits(seconds=20.0, memory=512))
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    ("program", "refused"),
    [
        ("ctypes.CDLL(None).getpid()", "`ctypes.dlopen`"),
        ("ctypes.cdll.LoadLibrary('libc.so.6')", "`ctypes.dlopen`"),
        ("ctypes.pythonapi.Py_IsInitialized()", "`ctypes.dlsym`"),
        ("_ctypes.dlsym(ctypes.pythonapi._handle, 'getpid')", "`ctypes.dlsym/handle`"),
        ("_ctypes.call_function(1, ())", "`ctypes.call_function`"),
        ("_ctypes.call_cdeclfunction(1, ())", "`ctypes.call_function`"),
        ("ctypes.CFUNCTYPE(ctypes.c_int)(('getpid', ctypes.pythonapi))", "`ctypes.dlsym`"),
        ("ctypes.c_int.in_dll(ctypes.pythonapi, 'Py_NoSiteFlag')", "`ctypes.dlsym`"),
        ("ctypes.c_int.from_address(id(0))", "`ctypes.cdata`"),
        ("ctypes.c_int.from_buffer(bytearray(8))", "`ctypes.cdata/buffer`"),
        ("ctypes.addressof(ctypes.c_int())", "`ctypes.addressof`"),
        ("ctypes.string_at(id(0), 8)", "`ctypes.string_at`"),
        ("ctypes.wstring_at(id(0), 8)", "`ctypes.wstring_at`"),
        ("_ctypes.PyObj_FromPtr(id(0))", "`ctypes.PyObj_FromPtr`"),
        ("ctypes.memmove(0, 0, 1)", "`memmove`"),
        ("ctypes.memset(0, 0, 1)", "`memset`"),
        ("ctypes.CFUNCTYPE(ctypes.c_int)(_ctypes._memset_addr + 0)()", ""),
        ("importlib.reload(ctypes)", "`ctypes.dlopen`"),
        ("sys.modules.clear()\nimport _ctypes", "to import `_ctypes`"),
        ("importlib.util.module_from_spec(importlib.util.spec_from_file_location('x', _ctypes.__file__))",
         "to import `x`"),
        ("import _cffi_backend", "to import `_cffi_backend`"),
        ("shutil.copy(_ctypes.__file__, 'mine.so')\nimportlib.machinery.ExtensionFileLoader('mine', './mine.so')"
         ".create_module(importlib.util.spec_from_file_location('mine', './mine.so'))", "to import `mine`"),
    ],
)  # fmt: skip
def test_way_into_compiled_libraries_is_refused(program: str, refused: str) -> None:
    modules = "import _ctypes, ctypes, importlib.machinery, importlib.util, shutil, sys\n"
    outcome = run_program(modules + program, Limits(seconds=20.0))
    assert outcome.reason.startswith(f"PermissionError: the sandbox refuses {refused}" if refused else "TypeError")


@pytest.mark.parametrize("name", ["numpy", "scipy.optimize", "sympy", "pandas"])
def test_library_of_solutions_can_be_imported(name: str) -> None:
    pytest.importorskip(name.split(".")[0])
    assert run_program(f"import {name}", Limits(seconds=60.0, memory=8192)) == sandbox.Outcome(True, "passed")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass",
        "import signal\nsignal.alarm(0)\nwhile True: pass",
    ],
)
def test_endless_program_is_killed_in_time(program: str) -> None:
    began = time.monotonic()
    assert run_program(program, SHORT).reason == "timeout: more than 1 s"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "change",
    [
        "open(PATH, 'w')",
        "open(PATH, 'a')",
        "__import__('pathlib').Path(PATH).write_bytes(b'')",
        "__import__('os').open(PATH, __import__('os').O_WRONLY)",
        "__import__('os').remove(PATH)",
        "__import__('os').rename(PATH, 'mine')",
        "__import__('os').chmod(PATH, 0)",
        "__import__('os').truncate(PATH, 0)",
        "__import__('os').mkdir(PATH + 'x')",
        "__import__('shutil').rmtree(FOLDER)",
        "__import__('os').chmod(__import__('os').open(PATH, 0), 0)",
        "__import__('os').remove('file', dir_fd=__import__('os').open(FOLDER, 0))",
        "__import__('os').rename('mine', 'file', dst_dir_fd=__import__('os').open(FOLDER, 0))",
        "__import__('shutil').move(PATH, 'mine')",
        "__import__('sqlite3').connect(PATH + 'x')",
        "(__import__('os').symlink(PATH, 'link'), open('link', 'w'))",
    ],
)
def test_file_outside_the_folder_stays_as_it_is(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    outcome = run_program(f"PATH, FOLDER = {str(path)!r}, {str(tmp_path)!r}\n{change}", Limits())
    assert outcome.reason.startswith("PermissionError: the sandbox refuses to change")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "kept")]


@pytest.mark.parametrize(
    "change",
    [
        "os.open('file', os.O_WRONLY | os.O_TRUNC, dir_fd=os.open(FOLDER, 0))",
        "os.mkfifo(FOLDER + '/fifo')",
        "sqlite3.connect(':memory:').execute(f'attach \"{FOLDER}/data\" as data').execute('create table data.t(a)')",
        "sqlite3.connect(f'file:{FOLDER}/data', uri=True).execute('create table t(a)')",
    ],
)
def test_file_that_no_audit_event_tells_of_stays_as_it_is(change: str, tmp_path: Path) -> None:
    if not LANDLOCK:
        pytest.skip("the kernel has no Landlock")
    path = tmp_path / "file"
    path.write_text("kept")
    assert not run_program(f"import os, sqlite3\nFOLDER = {str(tmp_path)!r}\n{change}", Limits()).passed
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "kept")]


def test_signal_does_not_reach_the_evaluation() -> None:
    program = "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGTERM)"
    assert run_program(program, Limits()).reason == "PermissionError: the sandbox refuses `pidfd_send_signal`"


def test_interpreter_without_the_audit_hook_is_refused(tmp_path: Path) -> None:
    program = f"""
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), "import os; os.system('touch {tmp_path}/a')")
"""
    assert not run_program(program, Limits()).passed
    assert not list(tmp_path.iterdir())


def test_folder_holds_no_more_than_its_size() -> None:
    if not NAMESPACES:
        pytest.skip("the kernel does not allow namespaces here")
    program = "for i in range(9): open(str(i), 'wb').write(bytes(2**23))"
    assert run_program(program, Limits()).reason == "OSError: [Errno 28] No space left on device"


def test_program_sees_no_network_where_the_kernel_allows_it() -> None:
    if not NAMESPACES:
        pytest.skip("the kernel does not allow namespaces here")
    program = (
        "interfaces = open('/proc/net/dev').readlines()[2:]\nassert len(interfaces) == 1 and 'lo:' in interfaces[0]"
    )
    assert run_program(program, Limits()).reason == "passed"


def test_program_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ", Limits()).passed


def test_folder_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert run_program("open('a', 'w').write('x')", Limits()).passed
    assert not list(tmp_path.iterdir())


def test_folder_may_be_where_semaphores_are(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    monkeypatch.setattr(sandbox.tempfile, "tempdir", "/dev/shm")
    program = "from multiprocessing.pool import ThreadPool\nopen(ThreadPool(2).map(str, [1])[0], 'w').write('x')"
    assert run_program(program, Limits()) == sandbox.Outcome(True, "passed")


def test_folder_of_folders_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(program: str, limits: Limits, folder: str) -> sandbox.Outcome:
        path = os.open(folder, 0)
        for _ in range(1000):
            os.mkdir("d", dir_fd=path)
            path, above = os.open("d", 0, dir_fd=path), path
            os.close(above)
        os.close(path)
        return sandbox.Outcome(True, "passed")

    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "_run", fill)
    assert run_program("", Limits()).passed
    assert not list(tmp_path.iterdir())


def test_other_platform_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(OSError, match="needs Linux, not `darwin`"):
        run_program("", Limits())


@pytest.mark.parametrize("limits", [{"seconds": 0.0}, {"seconds": float("nan")}, {"memory": 0}])
def test_limits_that_leave_nothing_raise(limits: dict) -> None:
    with pytest.raises(ValueError, match="leaves nothing to run in"):
        Limits(**limits)
