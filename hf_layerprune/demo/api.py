"""The one API endpoint of the demo, which is an MCP tool too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..errors import LayerPruneError
from .service import DemoService

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def add_api(service: DemoService) -> None:
    """Add the endpoint for programs, `compare`, to the page that is being built."""

    def compare(
        prompt: str,
        model: str = "",
        depth: int = 0,
        chat: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Let a language model and a compressed copy of it answer the same prompt, and measure both.

        Args:
            prompt (str): Text to continue, or a message.
            model (str): Name on the list of models; the first by default.
            depth (int): Layers of the compressed model; the nearest there is. 0 is the shallowest.
            chat (bool): Whether the prompt is a message to a chat model rather than a text to continue.
            max_new_tokens (int): Longest answer, in tokens.
            temperature (float): 0 takes the most likely token every time.
            top_p (float): Sample from the most likely tokens that hold this share of the probability.
            top_k (int): Sample from this many of the most likely tokens; 0 means all.
            repetition_penalty (float): Above 1, tokens that were there before become less likely.
            seed (int): Seed of the random numbers, which are the same for both models.

        Returns:
            dict: "original" and "compressed", each with its text, speed, memory and size, and a "summary" in words.
        """
        given = dict(locals())
        sampling = {name: given[name] for name in SAMPLING}
        try:
            for comparison in service.stream(prompt, model, depth, chat, sampling):
                yield comparison.to_dict()
        except LayerPruneError as error:  # of any other the log has it all, and who asked nothing
            raise gr.Error(str(error), print_exception=False) from None

    gr.api(compare, api_name="compare", concurrency_limit=None)
