"""`hf-layerprune demo`: original and compressed side by side, in the browser."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from ..demo import launch, read_settings, settings_of
from ..errors import LayerPruneError
from .arguments import DemoArguments
from .parsing import names_option, parse, words_apart


def demo(argv: list[str]) -> None:
    """Serve the demo until it is interrupted."""
    words, rest = words_apart(argv, DemoArguments)
    if words and any(names_option(argument, "--names") for argument in rest):
        raise LayerPruneError("models are named twice; give them either without an option or with --names")
    (arguments,) = parse((DemoArguments,), ["--names", *words, *rest] if words else rest)
    if arguments.models is not None and arguments.names:
        raise LayerPruneError(
            f"{' '.join(arguments.names)} and --models {arguments.models} are both given; the list can name them too"
        )
    settings = read_settings(arguments.models) if arguments.models else settings_of(arguments.names)
    if arguments.dtype is not None:
        settings = replace(settings, dtype=arguments.dtype)
    console = Console(stderr=True)
    launch(
        settings,
        lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        inbrowser=arguments.inbrowser,
    )
