"""The page of the demo: the one part that needs Gradio."""

from .app import build_page, launch_page

__all__ = ["build_page", "launch_page"]
