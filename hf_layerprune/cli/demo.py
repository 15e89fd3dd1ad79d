"""`hf-layerprune demo`: original and compressed side by side, in the browser."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..demo import launch, read_settings, settings_of
from ..errors import LayerPruneError
from ..progress import Console, say
from .parsing import parse


def demo(argv: list[str]) -> None:
    """Serve the demo until it is interrupted."""
    (arguments,) = parse("demo", argv)
    if arguments.models is not None and arguments.names:
        raise LayerPruneError(
            f"{' '.join(arguments.names)} and --models {arguments.models} are both given; the list can name them too"
        )
    settings = read_settings(arguments.models) if arguments.models else settings_of(arguments.names)
    if arguments.dtype is not None:
        settings = replace(settings, dtype=arguments.dtype)
    launch(
        settings,
        partial(say, Console(stderr=True)),
        server_name=arguments.server_name,
        server_port=arguments.server_port,
        inbrowser=arguments.inbrowser,
        share=arguments.share,
    )
