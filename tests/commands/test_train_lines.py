"""Lines of a data file that cannot be read are named as the file counts them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_hf.cli import main


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion"', "Line 4 of `{}` is no JSON ("),
        ("plain text", "Line 4 of `{}` is no JSON ("),
        ("[1, 2]", "Line 4 of `{}` holds a list, not the columns of a row"),
        ("null", "Line 4 of `{}` holds a NoneType, not the columns of a row"),
    ],
)
def test_train_bad_line_of_json_lines_is_named(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, line: str, message: str
) -> None:
    row = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join([row, "", row, line, row]))
    assert main(["train", "--config", str(recipe(dataset_name=str(path)))]) == 2
    assert message.format(path) in capsys.readouterr().err
