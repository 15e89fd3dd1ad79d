"""The demo: teacher and student side by side in the browser, as `hf-layerprune demo` and as a Space.

Only `page` needs Gradio.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import LayerPruneError, needs_extra
from .catalog import Pairing, open_catalog
from .service import DemoService, on_zero_gpu
from .settings import DemoSettings, Limits, ModelEntry, read_settings, settings_of

__all__ = [
    "DemoService", "DemoSettings", "Limits", "ModelEntry", "Pairing", "launch", "launch_space", "open_catalog",
    "read_settings", "settings_of",
]  # fmt: skip

logger = logging.getLogger(__name__)


def launch(settings: DemoSettings, on_message: Callable[[str], None] = logger.warning, **options: Any) -> None:
    """Load the first two models of a demo, and serve its page until Ctrl-C; `options` go to Gradio's `launch`."""
    if find_spec("gradio") is None:
        raise needs_extra("gradio, which serves the demo,", "demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    if on_zero_gpu():
        import spaces  # noqa: F401  # takes over CUDA, before anything touches a GPU
    from . import page

    service = DemoService(settings, open_catalog(settings, on_message))
    first = service.pairing()
    on_message(f"loading {' and '.join(first.names(first.depths[-1]))}, and answering an example ...")
    service.warm_up()
    app = page.build_page(service)
    try:
        with redirect_stdout(StringIO()):  # Gradio tells more than one needs
            page.launch_page(app, prevent_thread_lock=True, quiet=True, **options)
    except OSError as error:
        taken = f"port {options.get('server_port')} is in use; choose another, or none for the first free one"
        why = taken if options.get("server_port") else f"the demo cannot be served: {error}"
        raise LayerPruneError(why) from error
    if options.get("share") and not app.share_url:
        on_message("Gradio's server for shared links cannot be reached; the address below works on this machine alone")
    on_message(f"the demo is at {app.share_url or app.local_url} until you press Ctrl-C")
    try:
        threading.Event().wait(None if app.is_running else 0)
    except KeyboardInterrupt:
        app.close(verbose=False)


def launch_space(models: str | Path) -> None:
    """Serve the demo of a `models.yaml`: all of a Space's `app.py`."""
    launch(read_settings(models))
