"""`hf-layerprune push`: a run's student to the Hub."""

from __future__ import annotations

from functools import partial

from ..errors import LayerPruneError
from ..hub import push_run
from ..hub.paths import hub_id
from ..progress import Console, say
from .parsing import parse


def push(argv: list[str]) -> None:
    """Push the student of a run, or every depth of it."""
    (arguments,) = parse("push", argv)
    if arguments.output_dir is None or arguments.repo_id is None:
        raise LayerPruneError("which run, and where to? hf-layerprune push OUTPUT_DIR --repo_id user/name")
    if arguments.base_model is not None and hub_id(arguments.base_model) is None:
        raise LayerPruneError(f"base_model={arguments.base_model!r} is not a model on the Hub; give user/name")
    settings = vars(arguments) | {"private": arguments.private or None}
    commit = push_run(**settings, on_message=partial(say, Console(stderr=True)))
    say(Console(), f"pushed: {commit.commit_url}")
