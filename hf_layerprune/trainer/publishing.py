"""Push a trainer's finished students to the Hub, as `hf-layerprune push` does, and nothing before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.utils import logging

from ..files import write_atomically
from ..hub import load_run, push_run, run_card
from ..hub.push import full_name, open_repo
from ..record import RunRecord
from .config import IterativeLayerDistillConfig

logger = logging.get_logger(__name__)


class HubPublishing:
    """The part of the trainer that makes cards and pushes, for runs of several rounds.

    With `push_to_hub=True` the repository is found or made before the training starts, and the last student is pushed
    when the run is done.
    """

    args: IterativeLayerDistillConfig
    run: RunRecord | None
    model_name: str
    hub_model_id: str | None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find the repository this run will be pushed to, or make it."""
        if self.is_world_process_zero():
            api = HfApi(token=token or self.args.hub_token)
            self.hub_model_id = full_name(api, self._repo_id())
            open_repo(api, self.hub_model_id, private=self._private(private))

    def _private(self, private: bool | None) -> bool | None:
        return self.args.hub_private_repo if private is None else private

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint within a round stays here: it is not a student, and holds optimizer states."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        round: int | None = None,
        depth_tags: bool = False,
        tags: str | list[str] | None = None,
        dataset_name: str | list[str] | None = None,
        model_name: str | None = None,
    ) -> CommitInfo | Any:
        """Push the run in `args.output_dir`; see [`push_run`]. Only the main process does.

        Args:
            commit_message (`str`, *optional*): by default the depth and what it was made from.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait until it is pushed.
            token (`str`, *optional*): by default `args.hub_token`, `HF_TOKEN` or the stored login.
            revision (`str`, *optional*): branch to push to; by default `args.hub_revision`, else main.
            private (`bool`, *optional*): whether a repository that is made is private; by default
                `args.hub_private_repo`.
            round (`int`, *optional*): push the student of this round; by default the last one.
            depth_tags (`bool`, *optional*, defaults to `False`): every depth, each with a tag such as `28-layers`.
            tags (`str` or `list[str]`, *optional*): tags of the card, added to the library's own.
            dataset_name (`str` or `list[str]`, *optional*): Hub id of the data the run worked on, for the card.
            model_name (`str`, *optional*): taken as other trainers take it; the card is named after the repository.

        Returns:
            `CommitInfo`, or with `blocking=False` its `Future`; `None` on other processes.

        Raises:
            [`LayerPruneError`]: see [`push_run`].
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        options = {
            "round": round,
            "revision": revision or self.args.hub_revision,
            "depth_tags": depth_tags,
            "private": self._private(private),
            "token": token,
            "commit_message": commit_message,
            "base_model": self.model_name,
            "tags": _as_list(tags),
            "datasets": _as_list(dataset_name),
            "on_message": logger.info,
        }
        arguments = (self.args.output_dir, self._repo_id())
        if not blocking:
            return HfApi(token=token).run_as_future(push_run, *arguments, **options)
        return push_run(*arguments, **options)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder, from what the run has measured so far."""
        folder = Path(self.args.output_dir)
        if self.args.should_save and self.run is not None and self.run.rounds:
            names = (model_name or f"{folder.name}/model", self.model_name, _as_list(tags))
            card = run_card(load_run(folder), len(self.run.rounds), *names, datasets=_as_list(dataset_name))
            write_atomically(folder / "README.md", str(card))


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
