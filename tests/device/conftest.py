"""The test device is loaded for a whole process, so these tests run where no others do: `make test-device`."""

from pathlib import Path

import pytest
import torch

from . import fakegpu

HERE = Path(__file__).parent
ALONE = "A device cannot be unloaded, so these tests need a process of their own: run `make test-device`."


def is_alone(config: pytest.Config) -> bool:
    """Whether the process was started for these tests and no others."""
    asked = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    return all(path.is_relative_to(HERE) for path in asked)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if problem := fakegpu.missing() if is_alone(config) else ALONE:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return fakegpu.load()
