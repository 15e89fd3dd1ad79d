"""Which prompts the teacher answers, how it samples, and which answers are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import LayerPruneError

LONG_PROMPTS = ("refuse", "truncate")


@dataclass
class HealingDataConfig:
    r"""
    Settings of [`generate_healing_data`].

    Parameters:
        prompt_column (`str`, *optional*):
            Column of the prompts: lists of messages, or text. By default the first there is of `"messages"`,
            `"prompt"` and `"text"`. Answers at the end of a list of messages are left out, the teacher writes its own.
        as_chat (`bool`, *optional*, defaults to `False`):
            Make a user's message of each text, for the chat template; by default the teacher continues the text.
        prompt_tokens (`int`, *optional*, defaults to `32`):
            The prompt of a plain text is the words in its first `prompt_tokens` tokens. A column named `"prompt"` is
            taken whole.
        num_prompts (`int`, *optional*):
            Only the first rows; all by default.
        max_prompt_tokens (`int`, *optional*):
            Most tokens of a prompt, chat template included; by default what the model's positions leave beside
            `max_new_tokens`.
        long_prompts (`str`, *optional*, defaults to `"refuse"`):
            `"refuse"` one that is longer, before anything is generated, or `"truncate"`: the text, or the last
            message, loses its beginning.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Most tokens of an answer.
        temperature (`float`, *optional*):
            Temperature of the sampling; 0 takes the likeliest token each time. By default, as for `top_p` and `top_k`,
            the checkpoint's own; one whose generation config does not sample is sampled as it is, at temperature 1.
        top_p (`float`, *optional*): share of the probability that is sampled from.
        top_k (`int`, *optional*): number of tokens that are sampled from; 0 is all.
        seed (`int`, *optional*, defaults to `42`): seed of the sampling.
        batch_size (`int`, *optional*, defaults to `8`): prompts at a time, per process.
        keep_truncated (`bool`, *optional*, defaults to `True`):
            Whether answers that were cut at `max_new_tokens` stay; they are marked by `"truncated": true`.
        completion_only (`bool`, *optional*, defaults to `True`):
            Rows of `prompt` and `completion`, whose loss TRL takes on the completion only. Otherwise rows of
            `messages` or `text`, with the loss on all of it.

    Raises:
        [`LayerPruneError`]: for a value out of range.
    """

    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of the prompts, messages or text; default: 'messages', 'prompt' or 'text'."},
    )
    as_chat: bool = field(default=False, metadata={"help": "Make a user's message of each text."})
    prompt_tokens: int = field(
        default=32, metadata={"help": "Tokens at the beginning of a plain text that are its prompt."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first rows; all by default."})
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of a prompt; default: what the model's positions leave."}
    )
    long_prompts: str = field(
        default="refuse", metadata={"help": "What is done with longer ones: 'refuse' or 'truncate'."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature; 0 is greedy. Default of this, top_p and top_k: the checkpoint's."},
    )
    top_p: float | None = field(default=None, metadata={"help": "Share of the probability that is sampled from."})
    top_k: int | None = field(default=None, metadata={"help": "Number of tokens that are sampled from; 0 is all."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    batch_size: int = field(default=8, metadata={"help": "Prompts at a time, per process."})
    keep_truncated: bool = field(
        default=True, metadata={"help": "Whether answers that were cut at max_new_tokens stay (they are marked)."}
    )
    completion_only: bool = field(
        default=True,
        metadata={"help": "Rows of prompt and completion, with the loss on the completion; else messages or text."},
    )

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "num_prompts", "max_prompt_tokens", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LayerPruneError(f"{name}={value} is out of range; it must be at least 1")
        if self.long_prompts not in LONG_PROMPTS:
            raise LayerPruneError(f"long_prompts={self.long_prompts!r}; choose one of {', '.join(LONG_PROMPTS)}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise LayerPruneError(f"temperature={self.temperature} is out of range; give 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise LayerPruneError(f"top_p={self.top_p} is out of range; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise LayerPruneError(f"top_k={self.top_k} is out of range; give 0 (all tokens) or more")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            raise LayerPruneError("temperature=0 is greedy, top_p and top_k have no meaning with it; leave them out")
