"""Tasks over running text: how well a model predicts it, or how close it stays to its teacher on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from ..errors import LayerPruneError
from .chunks import PreparedTask, TokenChunk, filled
from .encoding import Encoded, length_limit, pad_id, right_padded
from .task import Task


@dataclass(eq=False, kw_only=True)
class PerplexityTask(Task):
    """Nats per token of text; an example is one window of `max_length` tokens, its weight the tokens scored in it.

    Texts are joined end to end, an end token behind each, and cut into windows; the last, shorter one counts too.
    `limit` is the number of windows, taken from the beginning of the data.

    Args:
        text (`str`, *optional*, defaults to `"{text}"`): template of a text over the row's columns.
        max_length (`int`, *optional*, defaults to 512): T, tokens per window.
    """

    kind: ClassVar[str] = "perplexity"
    templates: ClassVar[tuple[str, ...]] = ("text",)
    statistic: ClassVar[str] = "nll"

    text: str = "{text}"
    max_length: int = 512

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, max_length: int | None = None
    ) -> PreparedTask:
        length = min(self.max_length, length_limit(tokenizer, max_length))
        if length < 2:
            raise LayerPruneError(f"{self.title}: max_length={length}; a window needs at least two tokens")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        template = self.template("text")
        ids: list[int] = []
        for row in self.read():
            ids += tokenizer(template.render(row.values, row.where))["input_ids"] + end
            if self.limit is not None and len(ids) >= self.limit * length:
                ids = ids[: self.limit * length]
                break
        windows = [Encoded(ids[start : start + length], 1) for start in range(0, len(ids), length)]
        windows = [window for window in windows if len(window.ids) > 1]
        if not windows:
            raise LayerPruneError(f"{self.title}: the text has {len(ids)} tokens; two in a row are the least to score")
        chunks = [
            TokenChunk(right_padded(windows[part], pad_id(tokenizer)))
            for part in filled([1] * len(windows), batch_size)
        ]
        measure = "perplexity" if self.statistic == "nll" else "kl"
        return PreparedTask(self.name, self.weight, self.statistic, measure, chunks)


@dataclass(eq=False, kw_only=True)
class KLTask(PerplexityTask):
    """KL(teacher || model) of the next-token distributions over text, nats per token; settings as in
    [`PerplexityTask`]."""

    kind: ClassVar[str] = "kl"
    statistic: ClassVar[str] = "kl"
