"""A file of JSON lines that is seen only when it is whole, and that an interrupted run goes on with."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..startup.whole_file import write_whole

Record = dict[str, Any]


class UnfinishedFile:
    """Collects records beside a file, whose place they take at the end.

    Args:
        target: the file; must not exist.
        settings: of this run; only one with the same settings may go on with its records.

    Raises:
        FileExistsError: the file exists.
    """

    def __init__(self, target: Path, settings: Record) -> None:
        if target.exists():
            raise FileExistsError(f"`{target}` exists already: choose another output, or remove it.")
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self.settings = json.loads(json.dumps(settings))

    def resume(self, batch_size: int) -> list[Record]:
        """The records of an earlier run in whole batches, to which the file is cut back; none if there is no file.

        Raises:
            ValueError: they are of other settings.
        """
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(_line(self.settings).encode())
            return []
        if json.loads(lines[0]) != self.settings:
            raise ValueError(
                f"`{self.path}` is of an interrupted run with other options: give those again, or another output, "
                "or remove it."
            )
        whole = (len(lines) - 1) // batch_size * batch_size
        os.truncate(self.path, sum(map(len, lines[: whole + 1])))
        return [json.loads(line) for line in lines[1 : whole + 1]]

    def append(self, records: Sequence[Record]) -> None:
        """Writes records to the disk."""
        with self.path.open("ab") as file:
            file.write("".join(map(_line, records)).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, records: Sequence[Record]) -> None:
        """Writes the file with these records, and removes what was collected."""
        write_whole(self.target, "".join(map(_line, records)))
        self.path.unlink()


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
