"""The demo: teacher and student side by side in the browser, as `hf-layerprune demo` and as a Space.

Only `page` needs Gradio.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError, needs_extra
from .catalog import Pairing, open_catalog
from .service import DemoService, on_zero_gpu
from .settings import DemoSettings, Limits, ModelEntry, read_settings, settings_of

__all__ = [
    "DemoService",
    "DemoSettings",
    "Limits",
    "ModelEntry",
    "Pairing",
    "launch",
    "launch_space",
    "open_catalog",
    "read_settings",
    "settings_of",
]

logger = logging.getLogger(__name__)


def launch(settings: DemoSettings, on_message: Callable[[str], None] = logger.warning, **options: Any) -> Any:
    """Load the first two models of a demo, and serve its page until it is interrupted.

    Args:
        settings ([`DemoSettings`]): models and limits.
        on_message (`Callable`, *optional*): called with what cannot be opened, and why.
        options: passed to Gradio's `launch`, such as `server_port`.
    """
    if find_spec("gradio") is None:
        raise needs_extra("gradio, which serves the demo,", "demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    if on_zero_gpu():
        import spaces  # noqa: F401  # takes over CUDA, before anything touches a GPU
    from . import page

    service = DemoService(settings, open_catalog(settings, on_message))
    service.warm_up()
    try:
        return page.launch_page(page.build_page(service), **options)
    except OSError as error:
        raise LayerPruneError(f"the demo cannot be served: {error}") from error


def launch_space(models: str | Path) -> None:
    """Serve the demo of a `models.yaml`: all of a Space's `app.py`."""
    launch(read_settings(models))
