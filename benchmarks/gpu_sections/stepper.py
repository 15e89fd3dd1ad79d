"""Greedy decoding over a static cache, a whole step as one CUDA graph; elsewhere the same step, launched as usual.

Shapes: B prompts, T their length, S the most steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hf_layerprune.forward import CACHE

WARMUP = 3  # steps before the capture, in which libraries choose kernels and take their memory


class Stepper:
    """One model that decodes the continuation of a prompt, a token of every row a step.

    Args:
        model ([`~transformers.PreTrainedModel`]): with sdpa attention.
        prompt (`Tensor` of shape `(B, T)`): token ids.
        steps (`int`): how many steps will be taken at most, those of the warm-up included.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, steps: int) -> None:
        (rows, length), device = prompt.shape, prompt.device
        self.model, self.graph, self.taken, self.most = model, None, 0, steps
        self.cache = StaticCache(config=model.config, max_cache_len=length + steps + 1)
        self.slots = torch.arange(length + steps + 1, device=device).view(1, 1, 1, -1)
        self.mask = torch.zeros(rows, 1, 1, length + steps + 1, dtype=torch.bool, device=device)
        self.position = torch.full((rows, 1), length, device=device)
        with torch.no_grad():
            logits = model(input_ids=prompt, **{CACHE: self.cache}, use_cache=True, logits_to_keep=1).logits
        self.token = logits[:, -1:].argmax(-1)  # (B, 1)
        if device.type == "cuda":
            self._capture()

    def _step(self) -> None:
        torch.le(self.slots, self.position[:, None, None], out=self.mask)
        inputs = {"input_ids": self.token, "position_ids": self.position, "attention_mask": self.mask}
        logits = self.model(**inputs, **{CACHE: self.cache}, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))
        self.position.add_(1)

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.taken, graph = WARMUP, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take a step, and return the token `(B, 1)` it chose, which the next one changes."""
        self.taken += 1
        if self.taken > self.most:
            raise ValueError(f"step {self.taken} of a cache for {self.most}")
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.token
