"""The tab `Look inside`: the layers, what they are worth, and what both models expect next."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..catalog import Pairing
from ..render import notice, render_inside, render_positions
from ..service import DemoService
from ..settings import EXAMPLES
from .choice import ModelChoice
from .compare_tab import HIDDEN, ON_DEVICE
from .errors import sentence_of

BEFORE = notice("Each token is coloured by how differently the two models would go on after it.")


class InsideTab:
    """Widgets and what they do.

    Args:
        service ([`DemoService`]): answers.
        choice ([`ModelChoice`]): what is compared.
    """

    def __init__(self, service: DemoService, choice: ModelChoice) -> None:
        self.service = service
        first = service.catalog.first
        layers, quality, importance, _ = self.follow(first, first.depths[-1])
        self.layers = gr.HTML(layers, elem_id="lp-layers", padding=False)
        with gr.Row():
            with gr.Column(min_width=320):
                self.quality = gr.HTML(quality, elem_id="lp-quality", padding=False)
            with gr.Column(min_width=320):
                self.importance = gr.HTML(importance, elem_id="lp-importance", padding=False)
        gr.HTML('<h2 class="lp-title">Next tokens</h2>', padding=False)
        limit = f"At most {service.limits.max_inspected_tokens} tokens. Shift+Enter starts it."
        text = (first.examples or EXAMPLES)[0]
        self.text = gr.Textbox(text, label="Text to read", info=limit, lines=2, max_lines=6, elem_id="lp-text")
        with gr.Row(elem_classes="lp-buttons"):
            show = gr.Button("Show next tokens", variant="primary", elem_id="lp-inspect", min_width=140)
        self.positions = gr.HTML(BEFORE, elem_id="lp-positions", padding=False)
        asked, triggers = [self.text, choice.model, choice.depth], [show.click, self.text.submit]
        gr.on(triggers, self._inspect, asked, self.positions, **HIDDEN, **ON_DEVICE)

    @property
    def followers(self) -> list[Any]:
        """What `follow` fills."""
        return [self.layers, self.quality, self.importance, self.positions]

    def follow(self, pairing: Pairing, depth: int) -> list[str]:
        """The drawings of a depth; what was read with another is taken away."""
        drawings = render_inside(pairing, depth)
        return [*(f'<h2 class="lp-title">{title}</h2>{drawing}' for title, drawing in drawings.items()), BEFORE]

    def _inspect(self, text: str, model: str, depth: float) -> str:
        try:
            chosen = self.service.catalog[model].depth(depth)
            return render_positions(self.service.inspect(text, model, chosen), chosen)
        except Exception as error:
            return notice(sentence_of(error), problem=True)
