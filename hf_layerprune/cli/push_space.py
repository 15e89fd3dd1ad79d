"""`hf-layerprune push-space`: a Space on the Hub that compares students with their originals."""

from __future__ import annotations

from functools import partial

from ..demo.space import push_space as push
from ..errors import LayerPruneError
from ..progress import Console, say
from .parsing import parse


def push_space(argv: list[str]) -> None:
    """Make the Space, or update it."""
    (arguments,) = parse("push-space", argv)
    if arguments.repo_id is None or bool(arguments.runs) == (arguments.models is not None):
        raise LayerPruneError(
            "what should it show, and where? hf-layerprune push-space RUN ... --repo_id user/name, or --models with "
            "a YAML file instead of the Hub ids of runs"
        )
    commit = push(
        arguments.repo_id,
        arguments.models or arguments.runs,
        title=arguments.title,
        hardware=arguments.hardware,
        private=arguments.private or None,
        wheel=arguments.wheel,
        on_message=partial(say, Console(stderr=True)),
    )
    say(Console(), f"pushed: {commit.commit_url}")
