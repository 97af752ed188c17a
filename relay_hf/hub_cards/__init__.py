"""Model cards written from what ran: facts in, README.md with machine-readable metadata out. Works offline."""

from .card_data import NOT_EVALUATED, DatasetFacts, Evaluation, EvaluationRow, RelayCardData, TrainingFacts
from .citations import FAST_DLLM_V2_CITATION, RELAY_CITATION
from .editing import add_evaluation, has_card, read_card, set_usage
from .environment import hardware, versions
from .hub_ids import is_hub_id, link_model
from .markdown import slug
from .metadata import OWN_TAG, make_metadata
from .model_facts import cite_model, describe_channel, describe_model, plain_card
from .render import CARD, render_card, save_card
from .snippets import chat_snippet, fill_in_snippet, generate_snippet, usage_snippet

__all__ = [
    "CARD",
    "FAST_DLLM_V2_CITATION",
    "NOT_EVALUATED",
    "OWN_TAG",
    "RELAY_CITATION",
    "DatasetFacts",
    "Evaluation",
    "EvaluationRow",
    "RelayCardData",
    "TrainingFacts",
    "add_evaluation",
    "chat_snippet",
    "cite_model",
    "describe_channel",
    "describe_model",
    "fill_in_snippet",
    "generate_snippet",
    "hardware",
    "has_card",
    "is_hub_id",
    "link_model",
    "make_metadata",
    "plain_card",
    "read_card",
    "render_card",
    "save_card",
    "set_usage",
    "slug",
    "usage_snippet",
    "versions",
]
