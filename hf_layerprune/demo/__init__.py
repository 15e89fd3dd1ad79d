"""The demo: teacher and student side by side in the browser, as `hf-layerprune demo` and as a Space.

Only `page` needs Gradio.
"""

from .catalog import Pairing, open_catalog
from .service import DemoService
from .serving import launch, launch_space
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
