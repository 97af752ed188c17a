"""What a row of `generate` cost, as evaluations count it."""

from typing import Any

FORWARDS = ("denoise_forwards", "commit_forwards", "prefill_forwards")
COSTS = (*FORWARDS, "new_tokens")


def count_costs(output: Any, row: int) -> dict[str, int]:
    """The forwards of each kind and the `new_tokens` of one row; the stop token or text is one of them.

    Args:
        output: what `generate(..., return_dict_in_generate=True)` returned.
        row: index into its rows.
    """
    costs = {name: int(getattr(output, name)[row]) for name in FORWARDS}
    return {**costs, "new_tokens": round(float(output.tokens_per_forward[row]) * sum(costs.values()))}
