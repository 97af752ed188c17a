"""`relay-hf push`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..startup.options import option
from .parser import make_parser, parse


@dataclass
class PushArguments:
    """Arguments of the push. The token is never one of them: other users of a machine can read its command lines."""

    base_model: str | None = option(None, "Hub id of an adapter's base, where it was trained from a folder.")
    private: bool | None = option(None, "Whether a new repository is private; by default as its owner has it.")
    revision: str | None = option(None, "Branch to commit to; default: main.")
    commit_message: str | None = option(None, "First line of the commit's message.")


def run(program: str, argv: Sequence[str]) -> None:
    """Uploads a relay model, or an adapter of one, to the Hub in one commit."""
    positionals = {
        "FOLDER": "what `save_pretrained` or a trainer wrote",
        "REPO_ID": "owner/name; made if it does not exist",
    }
    arguments, where = parse(make_parser(program, positionals, PushArguments, run.__doc__), argv)
    # Not above: `--help` and refused options would wait for torch.
    from ..hub import push
    from ..hub.contents import whole_model_beside

    if merged := whole_model_beside(where.folder):
        print(
            f"relay-hf: `{where.folder}` holds an adapter, which others load on top of its base; the whole model is in "
            f"`{merged}`.",
            file=sys.stderr,
        )
    print(push(where.folder, where.repo_id, **asdict(arguments)).commit_url)
