"""A file is there as a whole or not at all."""

from pathlib import Path

import pytest

from relay_hf.startup.whole_file import write_whole


def test_write_whole_replaces_the_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_whole(path, "one\n")
    assert write_whole(path, "zwei ß\n").read_bytes() == "zwei ß\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_write_whole_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "rows.jsonl", "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800\n")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
