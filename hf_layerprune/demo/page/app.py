"""A Gradio app: what to compare on top, two tabs below, and one API endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..render.text import escaped
from ..service import DemoService
from ..sessions import Sessions
from .api import add_api
from .choice import ModelChoice
from .compare_tab import CompareTab
from .inside_tab import InsideTab

STYLE = Path(__file__).parent / "style.css"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
CODE_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def build_page(service: DemoService) -> gr.Blocks:
    """The app of a demo, not yet running.

    Args:
        service ([`DemoService`]): answers what visitors ask.
    """
    sessions = Sessions()
    with gr.Blocks(title=service.settings.title, analytics_enabled=False) as page:
        gr.HTML(_heading(service.settings.title), padding=False)
        choice = ModelChoice(service.catalog)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(service, sessions, choice)
            with gr.Tab("Look inside", id="inside"):
                inside = InsideTab(service, choice)
        choice.changed(service, compare, inside)
        add_api(service)

        def closed(request: gr.Request) -> None:
            sessions.stop(str(request.session_hash))

        page.unload(closed)
    page.queue(max_size=service.limits.max_waiting, default_concurrency_limit=1)
    return page


def launch_page(page: gr.Blocks, **options: Any) -> Any:
    """Serve a page: system fonts, nothing from other hosts, an MCP server where Gradio's extra for it is installed.

    Args:
        page (`gradio.Blocks`): what [`build_page`] gave.
        options: passed to `launch`.
    """
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=CODE_FONTS).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        layout_gap="0.75rem",
    )
    fixed = {"theme": theme, "css_paths": STYLE, "footer_links": ["api"], "ssr_mode": False, "pwa": False}
    return page.launch(**fixed, mcp_server=_speaks_mcp(), **options)


def _speaks_mcp() -> bool:
    """Whether Gradio's extra for MCP is installed, in releases that it works with."""
    try:
        import gradio.mcp  # noqa: F401
    except ImportError:
        return False
    return True


def _heading(title: str) -> str:
    return (
        f'<header class="lp-head"><h1>{escaped(title)}</h1><p>A language model, and a copy of it with fewer layers. '
        "Ask both the same and see what compression changed: the words, the speed, the layers.</p></header>"
    )
