"""The one endpoint for programs: `compare`, for `gradio_client` and as an MCP tool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import gradio as gr

from ..comparison import IN_TURN, Request
from ..sampling import Sampling
from ..service import DemoService, to_dict
from .compare_tab import ON_DEVICE
from .errors import told_of


def add_api(service: DemoService) -> None:
    """Add the endpoint to the page that is being built."""

    def compare(
        prompt: str,
        model: str = "",
        depth: int = 0,
        chat: bool = False,
        order: str = IN_TURN,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Let a language model and a compressed copy of it answer the same prompt, and measure both.

        Args:
            prompt (str): Text to continue, or a message.
            model (str): Name on the list of models; the first by default.
            depth (int): Layers of the compressed model; the nearest there is. 0 is the shallowest.
            chat (bool): Whether the prompt is a message to a chat model rather than a text to continue.
            order (str): "one after the other", which measures each model alone, or "at once".
            max_new_tokens (int): Longest answer, in tokens.
            temperature (float): 0 takes the most likely token every time.
            top_k (int): Draw from so many most likely tokens; 0 is all.
            top_p (float): Draw from the most likely tokens that hold this share of the probability.
            repetition_penalty (float): Above 1, tokens that were there before become less likely.
            seed (int): The luck of the draw, the same for both models.

        Returns:
            dict: "original" and "compressed", each with its text, speed, memory and size, and a "summary" in words.
        """
        given = dict(locals())
        sampling = {setting.name: given[setting.name] for setting in fields(Sampling)}
        try:
            for snapshot in service.stream(Request(prompt, model, depth, chat, order, sampling)):
                yield to_dict(snapshot)
        except Exception as error:
            raise gr.Error(told_of(error), print_exception=False) from None

    gr.api(compare, api_name="compare", **ON_DEVICE)
