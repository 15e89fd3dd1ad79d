"""Small tokenizers of every kind that a GGUF file can hold, trained on the embedded text."""

from __future__ import annotations

import json
from functools import cache

from conftest import END
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from hf_layerprune import embedded_dataset
from hf_layerprune.gguf_vocabulary import SPLITS

SIZE = 500
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "Hello, world! It's a test; they've said so.",
    "  two spaces,   three, and a tab\there",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(12))\n",
    "1234567890 and 3.14159, 2026-11-29",
    "Über Größe, naïve café, œuvre",
    "emoji 😀👩‍👩‍👧 and ❤️ done",
    "中文文本，混合 English。",
    "Привет, мир! مرحبا 안녕하세요",
    "{special}user\nWhat is this?{end}\n{special}assistant\n",
    " leading space, trailing space ",
    "\n\nnew lines\r\n\r\n \n end",
)


def split(name: str) -> Sequence:
    (pattern,) = [pattern for pattern, way in SPLITS.items() if way == name]
    regex = Split(Regex(pattern), behavior="isolated")
    return Sequence([regex, ByteLevel(add_prefix_space=False, use_regex=False)])


def corpus() -> list[str]:
    return [*embedded_dataset("calibration").select(range(40))["text"], "print(1234, 567)  # 89\n" * 5]


@cache
def byte_level(way: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text in llama.cpp's way of that name."""
    whole = ByteLevel(add_prefix_space=False)
    ways = {"gpt-2": whole, "smollm": Sequence([Digits(individual_digits=True), whole])}
    backend = Tokenizer(BPE(ignore_merges=way in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = ways.get(way) or split("llama-bpe" if way == "smaug-bpe" else way)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        corpus(),
        BpeTrainer(vocab_size=SIZE - 20, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False),
    )
    backend.add_tokens(["<tool>"])
    begins = way == "llama-bpe"
    if begins:
        backend.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END if begins else None, eos_token="<|im_end|>", pad_token=END
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def sentencepiece(legacy: bool = True) -> PreTrainedTokenizerFast:
    """BPE over characters, with bytes for those it does not know, as that of Llama 2."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Metaspace()
    trained.train_from_iterator(corpus(), BpeTrainer(vocab_size=SIZE - 300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    vocab = {token: index for index, token in enumerate([*first, *learned])}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts that tokenizers differ on, with special tokens of this one."""
    known = tokenizer.get_vocab()
    special, end = ("<|im_start|>", "<|im_end|>") if "<|im_end|>" in known else ("<s>", "</s>")
    return [text.replace("{special}", special).replace("{end}", end) for text in TEXTS]
