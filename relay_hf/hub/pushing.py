"""`push`: everything others need of a model, or of an adapter, in one commit.

1. gather and complete the files; 2. check them; 3. send them. Nothing is sent before all checks have passed.
"""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import PreTrainedTokenizerBase

from ..hub_cards import CARD, OWN_TAG, RelayCardData, is_hub_id, read_card
from ..hub_cards.hub_ids import is_repo_id
from ..modeling import RelayConfig
from ..version import __version__
from .checks import check_base, check_contents
from .contents import complete, gather
from .upload import Remote


def push(
    source: Any,
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: RelayCardData | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Uploads a relay model, or an adapter of one, with tokenizer, generation defaults, card and code in one commit.

    The repository loads with `relay_hf` installed, and without it by `trust_remote_code=True`. If the push fails, the
    repository is left as it was; one that was made for the push is removed again.

    Args:
        source: folder that `save_pretrained` or a trainer wrote, a `RelayForMaskedDiffusion`, or a `PeftModel` of one.
        repo_id: "owner/name"; made if it does not exist.
        tokenizer: replaces the folder's.
        card: replaces the folder's. Without either, a repository without a card gets a plain one.
        base_model: Hub id of an adapter's base, where the adapter was trained from a folder.
        private: whether a new repository is private; None = the default of its owner.
        token: token of the Hub; None = the one of `hf auth login` or `HF_TOKEN`.
        revision: branch to commit to; None = main.
        commit_message: first line of the message.

    Raises:
        ValueError: the files would be of no use to others; nothing was sent.
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        PushError: the Hub refused, or the connection was lost; an `OSError`.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo_id={repo_id!r}` is no name of a repository: write it as `owner/name`.")
    api = HfApi(token=token, library_name="relay_hf", library_version=__version__)
    with tempfile.TemporaryDirectory(prefix="relay-hf-push-") as name:
        scratch = Path(name)
        gather(source, scratch, tokenizer)
        check_contents(scratch)
        remote = Remote(api, repo_id, revision)
        remote.look()
        base = complete(
            scratch,
            repo_id,
            folder=str(Path(source).resolve()) if isinstance(source, str | Path) else None,
            base_model=base_model,
            card=card,
            write_card=CARD not in remote.files,
        )
        if base is not None:
            check_base(RelayConfig.from_pretrained(scratch), base, token)
        _inherit_license(scratch, token)
        message = commit_message or f"Upload {'model' if base is None else 'adapter'} with relay_hf"
        return remote.commit(scratch, message, private)


def _inherit_license(scratch: Path, token: str | None) -> None:
    """A card of ours that names no license gets that of the base, if the base's card is on the Hub and names one."""
    if not (scratch / CARD).exists():
        return
    card = read_card(scratch)
    is_ours = OWN_TAG in (card.data.tags or [])
    if not is_ours or card.data.license or not is_hub_id(card.data.base_model):
        return
    try:
        base: Any = ModelCard.load(card.data.base_model, token=token).data
    except Exception:  # no card, or an unreadable one: errors of the Hub's client and of the YAML library
        return
    for name in ("license", "license_name", "license_link"):
        setattr(card.data, name, getattr(base, name, None))
    card.save(scratch / CARD)
