"""The demo: original and compressed side by side in the browser, as `hf-layerprune demo` and as a Space.

Everything but `page` works without Gradio.
"""

from .catalog import Catalog, open_catalog
from .service import DemoService
from .serving import launch, launch_space, open_demo
from .settings import DemoSettings, Limits, ModelEntry, read_settings, settings_of

__all__ = [
    "Catalog",
    "DemoService",
    "DemoSettings",
    "Limits",
    "ModelEntry",
    "launch",
    "launch_space",
    "open_catalog",
    "open_demo",
    "read_settings",
    "settings_of",
]
