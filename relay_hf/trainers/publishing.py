"""The card of a training, and its upload."""

from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from ..hub import push
from ..hub_cards import save_card
from ..pictures.training import logged, plot_training
from .card import TRAINING_PICTURE, training_card
from .checkpoints import ResumableTrainer
from .relay_config import RelayTrainerConfig
from .rollouts.reference import Reference


class PublishingTrainer(ResumableTrainer):
    """Writes our card in place of TRL's, and uploads the model as `relay_hf.push` does."""

    _tag_names = ["relay", "masked-diffusion", "trl"]
    _name = "Relay"
    _paper = {
        "title": "Learned Relay Representations for Forward-Thinking Discrete Diffusion Models",
        "id": "2605.22967",
    }
    args: RelayTrainerConfig
    reference: Reference | None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer; saves the averaged weights, if there are any."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            # Left to the Trainer, this would come before the adapter is complete.
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes our card into the output folder, in place of TRL's; arguments as there, with any number of data sets.

        Without `dataset_name`, a data set that was loaded from the Hub names itself.
        """
        if not self.is_world_process_zero():
            return
        name = model_name or Path(self.args.output_dir).name
        history, picture = self.state.log_history, None
        if len(logged(history, "loss")) > 1:
            place = Path(self.args.output_dir) / TRAINING_PICTURE
            picture = plot_training(history, place, f"Training of {name}").name
        names = [dataset_name] if isinstance(dataset_name, str) else dataset_name or []
        card = training_card(self, name, names, picture)
        extra = [tags] if isinstance(tags, str) else list(tags or [])
        save_card(replace(card, tags=extra), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the model and uploads it as `relay_hf.push` does; arguments as in the Trainer.

        Returns: the commit, a `Future` of it if not `blocking`, and None in all processes but the first.
        Raises: those of `push`.
        """
        token = token if token is not None else self.args.hub_token
        self.save_model(_internal_call=True)  # by all processes together
        if not self.is_world_process_zero():
            return None
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).name
        if "/" not in repo_id:
            repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        kwargs.setdefault("tags", list(getattr(self.model, "model_tags", None) or []))
        self.create_model_card(**{"model_name": repo_id.split("/")[1], **kwargs})
        # Of a checkpoint. The Trainer has no public way to wait for it, and two commits would be in each other's way.
        self._finish_current_push()
        send = partial(
            push,
            self.args.output_dir,
            repo_id,
            private=private if private is not None else self.args.hub_private_repo,
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )
        return send() if blocking else HfApi().run_as_future(send)
