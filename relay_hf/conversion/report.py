"""What a conversion did, as data and as text."""

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """What became of a checkpoint.

    Args:
        source: the checkpoint that was read.
        output: folder where the relay model is.
        family: its `model_type`.
        backbone: `model_type` of the backbone that its weights are in now.
        block_size: positions that are denoised together, None = the whole sequence.
        token_shift: whether the raw head scores the next token.
        relay_channel: the channel between denoising steps.
        mask_token_id: id of [MASK].
        mask_token: the origin of that id.
        renamed: new name of every parameter that has one.
        merged: parameters that transformers packed into others, as it does with experts.
        initialised: parameters, or rows of them, that the source does not have.
        left_out: parameters of the source that have no place in the model and do not change what it computes.
        notes: further sentences for the user.
    """

    source: str
    output: str
    family: str
    backbone: str
    block_size: int | None
    token_shift: bool
    relay_channel: str
    mask_token_id: int
    mask_token: str
    renamed: dict[str, str] = field(default_factory=dict)
    merged: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        blocks = "the whole sequence at once" if self.block_size is None else f"blocks of {self.block_size}"
        lines = [
            f"converted `{self.source}` to `{self.output}`",
            f"  family       {self.family} on the backbone {self.backbone}",
            f"  denoises     {blocks}, {'with' if self.token_shift else 'without'} token shift",
            f"  channel      {self.relay_channel}",
            f"  mask token   {self.mask_token_id}, {self.mask_token}",
        ]
        sections = {
            "renamed": [f"{old} -> {new}" for old, new in self.renamed.items()],
            "merged": self.merged,
            "initialised": self.initialised,
            "left out": self.left_out,
            "note": self.notes,
        }
        for title, entries in sections.items():
            for entry, count in _by_layer(entries).items():
                lines.append(f"  {title:<12} {entry}" + (f" ({count} layers)" if count > 1 else ""))
        return "\n".join(lines)


def _by_layer(entries: list[str]) -> Counter[str]:
    """One line for what every layer, and every expert, has; counts how many were put together."""
    return Counter(re.sub(r"\.\d+\.", ".*.", entry) for entry in entries)
