"""A model of the tests as a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantized: bool = False,
    rope_factors: Tensor | None = None,
    metadata: dict[str, str | int] | None = None,
    left_out: str | None = None,
) -> Path:
    """Write a Qwen2 or Llama; `quantized` matrices are Q8_0, and the vocabulary is of bytes, without merges."""
    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        writer.add_key_value(
            key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT16
        )
    if tokenizer is not None:
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token == tokenizer.eos_token else 1 for token in tokens])
        writer.add_token_scores([0.0] * len(tokens))  # merges follow from them: none
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.eos_token_id)
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known, f"{name} has no place in a GGUF file of a {kind}"
        if known == left_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.float().numpy()
        if kind == "llama" and ("attn_q." in known or "attn_k." in known):  # llama.cpp rotates neighbours
            heads = config.num_attention_heads if "attn_q." in known else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        if quantized and values.ndim == 2 and values.shape[-1] % 32 == 0:
            kept = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(known, gguf.quants.quantize(np.ascontiguousarray(values), kept), raw_dtype=kept)
        else:
            writer.add_tensor(known, np.ascontiguousarray(values))
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
