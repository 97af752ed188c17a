"""The versions of vLLM that the plug-in knows: it uses parts that vLLM does not promise to keep."""

OLDEST, BELOW = (0, 32), (0, 34)


def check_version() -> None:
    """Checks the installed vLLM.

    Raises:
        ImportError: its version is not in the range [OLDEST, BELOW).
    """
    import vllm

    check_known(vllm.__version__)


def check_known(version: str) -> None:
    """Raise an ImportError if `version` of vLLM is none that the plug-in knows."""
    numbers = [int(part) if part.isdigit() else -1 for part in version.split(".")[:2]]
    if not OLDEST <= tuple(numbers) < BELOW:
        oldest, below = (".".join(map(str, each)) for each in (OLDEST, BELOW))
        raise ImportError(
            f"vLLM {version} is installed, but relay_hf serves with vLLM >= {oldest} and < {below}: install one of "
            "these, or set `VLLM_PLUGINS` to the plug-ins that other models need."
        )
