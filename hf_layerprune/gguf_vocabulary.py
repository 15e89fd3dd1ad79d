"""A tokenizer as the metadata of a GGUF file, by which llama.cpp gives the same tokens as transformers.

llama.cpp reads two kinds of tokenizer: `gpt2`, byte-level BPE with merges and the name of a pre-tokenizer, and
`llama`, SentencePiece with a score for each token. Whatever else a tokenizer does is refused.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .errors import LayerPruneError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens; those of `gguf.TokenType`."""
PRE_TOKENIZERS = {
    ("qwen2", False): "qwen2",
    ("llama-bpe", True): "llama-bpe",
    ("llama-bpe", False): "smaug-bpe",
    ("tekken", True): "tekken",
    ("gpt-2", False): "gpt-2",
    ("smollm", False): "smollm",
}
"""How text is split, and whether whole words ignore the merges, to llama.cpp's name for both."""
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""Patterns that split text, as tokenizer.json has them, to the way they do it; newer transformers list them too."""
SPACE = "▁"
PREFIXED = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, object]:
    """What a GGUF file says of a tokenizer, by the names of the writer's methods without their `add_`.

    Raises [`LayerPruneError`] if llama.cpp would not give the same tokens.
    """
    if not tokenizer.is_fast:
        raise _refused(f"it is a {type(tokenizer).__name__}, which has no tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refused(f"it is of type {model['type']}")
    known, size = tokenizer.get_vocab(), config.vocab_size
    if max(known.values()) >= size:
        raise _refused(f"it has {max(known.values()) + 1:,} tokens, the model only {size:,}")
    added = {token["id"]: token for token in content["added_tokens"]}
    if strips := next((token for token in added.values() if token["lstrip"] or token["rstrip"]), None):
        raise _refused(f"its token {strips['content']} strips the spaces around it")
    byte_level = not model["byte_fallback"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [UNUSED] * size
    for token, index in known.items():
        tokens[index], types[index] = token, _type_of(token, added.get(index), byte_level, model["unk_token"])
    found: dict[str, object] = {
        "tokenizer_model": "gpt2" if byte_level else "llama",
        "tokenizer_pre": _pre_tokenizer(content) if byte_level else "default",
        "token_list": tokens,  # one for every row of the embedding
        "token_types": types,
        "add_space_prefix": False if byte_level else _space_prefix(content),
    }
    if byte_level and model["merges"]:
        found["token_merges"] = [" ".join(pair) for pair in model["merges"]]
    else:  # a reader of `gpt2` without merges looks for scores
        found["token_scores"] = [0.0] * size if byte_level else _scores(tokens, model["merges"])
    found |= _special_ids(tokenizer, config) | _added_around(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return found | ({"chat_template": template} if template else {})


def _refused(why: str) -> LayerPruneError:
    return LayerPruneError(f"the tokenizer cannot be written for llama.cpp: {why}")


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    whole = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    parts = content["pre_tokenizer"] or {}
    parts = [
        {key: value for key, value in part.items() if key != "trim_offsets"}
        for part in parts.get("pretokenizers", [parts])
    ]
    match parts:
        case [only] if only == whole:
            way = "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, last] if last == whole:
            way = "smollm"
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, last]:
            way = SPLITS.get(regex) if last == whole | {"use_regex": False} else None
        case _:
            way = None
    normalizer = (content["normalizer"] or {}).get("type", "NFC")  # NFC is Qwen's, and llama.cpp leaves it out
    pre = PRE_TOKENIZERS.get((way, content["model"]["ignore_merges"]))
    if pre is None or normalizer != "NFC":
        raise _refused("it does not split text like Qwen2, Llama 3, Tekken, SmolLM or GPT-2")
    return pre


def _space_prefix(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    match content["normalizer"], content["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": parts}, None if parts == PREFIXED:
            return True
        case {"type": "Replace"} as only, None if only == PREFIXED[1]:
            return False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
            return scheme != "never"
    raise _refused("it has byte tokens, but treats spaces in another way than Llama 2")


def _type_of(token: str, added: dict[str, Any] | None, byte_level: bool, unknown: str | None) -> int:
    if not byte_level and token == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    is_byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores by which SentencePiece merges in the order of `merges`: of two, the higher one comes first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = len(merges)  # of a token that no merge makes, so that llama.cpp does not make it first
    return [-float(ranks.get(token, last if len(token) > 1 else 0)) for token in tokens]


def _special_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> dict[str, int]:
    """Ids by name: the tokenizer's, else those of the config."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        index = getattr(tokenizer, name)
        index = getattr(config, name, None) if index is None else index
        index = index[0] if isinstance(index, list) else index
        if index is not None:
            found[name] = index
    if "eos_token_id" not in found:  # llama.cpp would take token 11
        raise _refused("neither it nor the config names an end token")
    return found


def _added_around(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts `bos` before a text, and `eos` after it."""
    text, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    before = whole[:1] != text[:1] and whole[0] == tokenizer.bos_token_id
    after = whole[-1:] != text[-1:] and whole[-1] == tokenizer.eos_token_id
    if whole != [tokenizer.bos_token_id] * before + text + [tokenizer.eos_token_id] * after:
        raise _refused("it adds tokens other than its begin and end token to a text")
    return {"add_bos_token": before, "add_eos_token": after}
