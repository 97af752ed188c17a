import os
import subprocess
import sys

import pytest

import relay_hf


def test_public_names_all_exist() -> None:
    for name in relay_hf.__all__:
        assert getattr(relay_hf, name) is not None


def test_public_names_unknown_raises() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'RelayTrianer'"):
        relay_hf.RelayTrianer  # noqa: B018


def test_import_does_not_load_the_libraries_of_training_and_drawing() -> None:
    code = "import sys, relay_hf; print([m for m in ('trl', 'peft', 'datasets', 'matplotlib') if m in sys.modules])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert shown.stdout.strip() == "[]"
