"""What is compared: a model of the list, and the depth of its compressed copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from ..catalog import Catalog, Pairing
from ..render.text import escaped

if TYPE_CHECKING:
    from ..service import DemoService
    from .compare_tab import CompareTab
    from .inside_tab import InsideTab


class ModelChoice:
    """The two widgets above the tabs.

    Args:
        catalog ([`Catalog`]): what can be chosen.
    """

    def __init__(self, catalog: Catalog) -> None:
        first = catalog.first
        with gr.Row(visible=len(catalog.names) > 1 or len(first.depths) > 1) as self.row:
            self.model = gr.Dropdown(
                catalog.names,
                value=first.name,
                label="Model",
                filterable=False,
                visible=len(catalog.names) > 1,
                min_width=260,
                elem_id="lp-model",
            )
            self.depth = gr.Slider(elem_id="lp-depth", min_width=260, **_slider(first))
        self.about = gr.HTML(_about(first), padding=False)
        self.shown = gr.State((first.name, first.depths[-1]))  # what the page below follows
        self.catalog = catalog

    def changed(self, service: DemoService, compare: CompareTab, inside: InsideTab) -> None:
        """Let both tabs follow the choice."""

        def on_model(name: str) -> list[object]:
            pairing = self.catalog[name]
            depth = pairing.depths[-1]
            shown = len(self.catalog.names) > 1 or len(pairing.depths) > 1
            own = [gr.Row(visible=shown), gr.Slider(**_slider(pairing)), _about(pairing), (name, depth)]
            return [*own, *compare.follow(pairing, depth), *inside.follow(pairing, depth)]

        def on_depth(name: str, depth: float, mode: str, shown: tuple[str, int]) -> list[object]:
            pairing = self.catalog[name]
            nearest = pairing.depth(depth)
            if (name, nearest) == tuple(shown):  # the page drew the slider: answers that came since stay
                return [gr.skip()] * len(followers)
            return [(name, nearest), *compare.follow_depth(pairing, nearest, mode), *inside.follow(pairing, nearest)]

        # Drawings are quick and wait for nobody: not for what runs on the device, nor do they fill the queue.
        hidden = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        everything = [self.row, self.depth, self.about, self.shown, *compare.followers, *inside.followers]
        self.model.input(on_model, self.model, everything, **hidden)
        followers = [self.shown, *compare.depth_followers, *inside.followers]
        chosen = [self.model, self.depth, compare.chatting, self.shown]
        # `change`, unlike `release`, is for the keyboard as well. It also comes while the range changes with the
        # model, when the depth is still that of the one before: the range is not checked, the nearest depth is taken.
        self.depth.change(on_depth, chosen, followers, trigger_mode="always_last", preprocess=False, **hidden)

    @property
    def widgets(self) -> list[gr.Dropdown | gr.Slider]:
        """What must not change while an answer to it is written."""
        return [self.model, self.depth]


def _slider(pairing: Pairing) -> dict[str, object]:
    depths = pairing.depths
    several = len(depths) > 1
    return {
        "minimum": depths[-1],
        "maximum": depths[0] if several else depths[-1] + 1,
        "step": 1,
        "value": depths[-1],
        "label": "Depth of the compressed model, in layers",
        "visible": several,
    }


def _about(pairing: Pairing) -> str:
    return f'<p class="lp-about">{escaped(pairing.description)}</p>' if pairing.description else ""
