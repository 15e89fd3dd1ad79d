"""`hf-layerprune push-space`: a Space on the Hub that compares students with their originals."""

from __future__ import annotations

from rich.console import Console

from ..demo.space import push_space as push
from ..errors import LayerPruneError
from .arguments import PushSpaceArguments
from .parsing import names_option, parse, words_apart


def push_space(argv: list[str]) -> None:
    """Make the Space, or update it."""
    words, rest = words_apart(argv, PushSpaceArguments)
    if words and any(names_option(argument, "--runs") for argument in rest):
        raise LayerPruneError("runs are named twice; give them either without an option or with --runs")
    (arguments,) = parse((PushSpaceArguments,), ["--runs", *words, *rest] if words else rest)
    if arguments.repo_id is None:
        raise LayerPruneError("where to? give --repo_id user/name")
    if bool(arguments.runs) == (arguments.models is not None):
        raise LayerPruneError("what shall it show? give Hub ids of pushed students, or --models with a YAML file")
    console = Console(stderr=True)
    commit = push(
        arguments.repo_id,
        arguments.models or arguments.runs,
        title=arguments.title,
        hardware=arguments.hardware,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
        on_message=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    )
    Console().print(f"pushed: {commit.commit_url}", highlight=False, markup=False, soft_wrap=True)
