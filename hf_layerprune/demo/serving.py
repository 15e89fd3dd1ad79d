"""Start the demo: on this machine, or as a Space."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError
from .catalog import open_catalog
from .device import prepare_zero_gpu
from .render import render_inside
from .service import DemoService
from .settings import DemoSettings, read_settings

logger = logging.getLogger(__name__)

FIRST_PORT = 7860


def open_demo(settings: DemoSettings, on_message: Callable[[str], None] = logger.warning) -> Any:
    """The page of a demo, its first two models loaded.

    Args:
        settings ([`DemoSettings`]): models and limits.
        on_message (`Callable`, *optional*): told what could not be opened.

    Returns:
        `gradio.Blocks`

    Raises:
        [`LayerPruneError`]: if Gradio is not installed, or no model of the list can be opened.
    """
    if find_spec("gradio") is None:
        raise LayerPruneError("the demo needs Gradio; install it with: pip install 'hf-layerprune[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    prepare_zero_gpu()
    from .page import build_page

    service = DemoService(settings, open_catalog(settings, on_message, render_inside))
    service.warm_up()
    return build_page(service)


def launch(settings: DemoSettings, on_message: Callable[[str], None] = logger.warning, **options: Any) -> Any:
    """Open a demo and serve it until it is interrupted.

    Args:
        settings ([`DemoSettings`]): models and limits.
        on_message (`Callable`, *optional*): told what could not be opened.
        options: passed to Gradio's `launch`, such as `server_port`.

    Raises:
        [`LayerPruneError`]: as [`open_demo`], or if the port is taken.
    """
    page = open_demo(settings, on_message)
    from .page import launch_page

    if options.get("server_port") is None and "GRADIO_SERVER_PORT" not in os.environ:
        # Gradio would try one port after the other itself, but an MCP server can be started only once
        options["server_port"] = _free_port(options.get("server_name") or "127.0.0.1")
    try:
        return launch_page(page, **options)
    except OSError as error:
        raise LayerPruneError(f"the demo cannot be served: {error}") from error


def _free_port(host: str) -> int | None:
    """The first free port of those that Gradio serves on; none, and the error is Gradio's."""
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((host, port))
            except OSError:
                continue
            return port
    return None


def launch_space(models: str | Path) -> None:
    """Serve the demo of a `models.yaml`: all of a Space's `app.py`."""
    launch(read_settings(models))
