"""`hf-layerprune push`: a run's student to the Hub."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from ..errors import LayerPruneError
from ..hub import push_run
from ..hub.paths import hub_id
from ..progress import say
from .parsing import parse


def push(argv: list[str]) -> None:
    """Push the student of a run, or every depth of it."""
    (arguments,) = parse("push", argv)
    if arguments.output_dir is None:
        raise LayerPruneError("which run? give its output folder: hf-layerprune push OUTPUT_DIR --repo_id user/name")
    if arguments.repo_id is None:
        raise LayerPruneError("where to? give --repo_id user/name")
    if arguments.base_model is not None and hub_id(arguments.base_model) is None:
        raise LayerPruneError(f"base_model={arguments.base_model!r} is not a model on the Hub; give user/name")
    commit = push_run(
        arguments.output_dir,
        arguments.repo_id,
        round=arguments.round,
        revision=arguments.revision,
        depth_tags=arguments.depth_tags,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
        base_model=arguments.base_model,
        on_message=partial(say, Console(stderr=True)),
    )
    say(Console(), f"pushed: {commit.commit_url}")
