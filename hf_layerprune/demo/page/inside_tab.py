"""The tab `Look inside`: the layers, what they are worth, and what both models expect next."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...errors import LayerPruneError
from ..catalog import Pairing
from ..render import notice, render_importance, render_layers, render_positions, render_quality
from ..service import DemoService
from ..settings import EXAMPLES
from .choice import ModelChoice
from .compare_tab import HIDDEN, ON_DEVICE


class InsideTab:
    """Widgets and what they do.

    Args:
        service ([`DemoService`]): answers.
        choice ([`ModelChoice`]): what is compared.
    """

    def __init__(self, service: DemoService, choice: ModelChoice) -> None:
        self.service = service
        first = service.catalog.first
        layers, quality, importance = self.follow(first, first.depths[-1])
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
        self.positions = gr.HTML(
            notice("Each token is coloured by how differently the two models would go on behind it."),
            elem_id="lp-positions",
            padding=False,
        )
        for trigger in (show.click, self.text.submit):
            trigger(self._inspect, [self.text, choice.model, choice.depth], self.positions, **HIDDEN, **ON_DEVICE)

    @property
    def followers(self) -> list[Any]:
        """What `follow` fills."""
        return [self.layers, self.quality, self.importance]

    def follow(self, pairing: Pairing, depth: int) -> list[str]:
        """The drawings of a depth."""
        rounds, report = pairing.rounds(depth), pairing.report
        settings = report["settings"] if report else {}
        drawings = {
            "Layer map": render_layers(pairing.plans[depth], rounds, settings),
            "Quality against depth": render_quality(report, depth),
            "Importance of the layers": render_importance(rounds),
        }
        return [f'<h2 class="lp-title">{title}</h2>{drawing}' for title, drawing in drawings.items()]

    def _inspect(self, text: str, model: str, depth: float) -> str:
        try:
            return render_positions(self.service.inspect(text, model, self.service.catalog[model].depth(depth)))
        except LayerPruneError as error:
            message = str(error)
            return notice(message[:1].upper() + message[1:], problem=True)
