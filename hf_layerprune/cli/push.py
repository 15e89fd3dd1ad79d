"""`hf-layerprune push`: a run's student to the Hub."""

from __future__ import annotations

from rich.console import Console

from ..errors import LayerPruneError
from ..hub import push_run
from ..hub.scrub import hub_id
from .arguments import PushArguments
from .parsing import names_option, parse, words_apart


def push(argv: list[str]) -> None:
    """Push the student of a run, or every depth of it."""
    (arguments,) = parse((PushArguments,), _spelled_out(argv))
    if arguments.output_dir is None:
        raise LayerPruneError("which run? give its output folder: hf-layerprune push OUTPUT_DIR --repo_id user/name")
    if arguments.repo_id is None:
        raise LayerPruneError("where to? give --repo_id user/name")
    if arguments.base_model is not None and hub_id(arguments.base_model) is None:
        raise LayerPruneError(f"base_model={arguments.base_model!r} is no model on the Hub; give user/name")
    console = Console(stderr=True)
    commit = push_run(
        arguments.output_dir,
        arguments.repo_id,
        round=arguments.round,
        revision=arguments.revision,
        depth_tags=arguments.depth_tags,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
        base_model=arguments.base_model,
        on_message=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
    )
    Console().print(f"pushed: {commit.commit_url}", highlight=False, markup=False, soft_wrap=True)


def _spelled_out(argv: list[str]) -> list[str]:
    """The word that belongs to no option is `--output_dir`."""
    words, rest = words_apart(argv, PushArguments)
    if len(words) > 1:
        raise LayerPruneError(f"{' '.join(words)} are {len(words)} folders; push one run at a time")
    if words and any(names_option(argument, "--output_dir", "--output-dir") for argument in rest):
        raise LayerPruneError("the run is named twice; give its folder either without an option or with --output_dir")
    return ["--output_dir", *words, *rest] if words else rest
