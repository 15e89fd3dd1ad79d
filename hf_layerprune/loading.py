"""Load models and tokenizers a user names; every mistake is one clear line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from .architectures import check_supported
from .data import EMBEDDED_MODEL
from .environment import native_dtype
from .errors import LayerPruneError, first_line
from .surgery import plan_of

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
BESIDE_WEIGHTS = ("revision", "trust_remote_code", "token")
"""Options of a model that its config and its tokenizer need too."""
EMBEDDED = "embedded"
"""Name of the model that comes with the package, wherever a model is named."""


def resolve(name_or_path: str) -> str:
    """Where a named model lies: the package's own folder for `"embedded"`, else the name without its `@revision`."""
    return EMBEDDED_MODEL if name_or_path == EMBEDDED else split_revision(name_or_path)[0]


def split_revision(name_or_path: str) -> tuple[str, str | None]:
    """A Hub id may say which revision is meant, as in `"user/name@28-layers"`; a folder does not."""
    name, at, revision = name_or_path.partition("@")
    return (name, revision) if at and not Path(name_or_path).exists() else (name_or_path, None)


def one_revision(name_or_path: str, revision: str | None) -> str | None:
    """The revision that the name says, or `revision`; `None` is the main one.

    Raises:
        [`LayerPruneError`]: if they are two.
    """
    named = split_revision(name_or_path)[1]
    if named is not None and revision not in (None, named):
        raise LayerPruneError(f"{name_or_path} names another revision than revision={revision!r}; give one")
    return revision if named is None else named


def _options(name_or_path: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained`: the revision the name says, and no code of the repository's unless asked for."""
    options = {"trust_remote_code": False} | kwargs
    revision = one_revision(name_or_path, kwargs.get("revision"))
    return options if revision is None else options | {"revision": revision}


def beside_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options a model is loaded with, those its config and its tokenizer are loaded with."""
    return {key: options[key] for key in BESIDE_WEIGHTS if key in options}


def name_of(model: PreTrainedModel) -> str:
    """The name a model was loaded by."""
    name = model.config._name_or_path
    return EMBEDDED if name == EMBEDDED_MODEL else name


def load_config(name_or_path: str, **kwargs: Any) -> PretrainedConfig:
    """The config of a model that is supported.

    Raises:
        [`LayerPruneError`]: if there is none, or its architecture is not supported.
    """
    folder = Path(resolve(name_or_path))
    if folder.exists() and not (folder / "config.json").is_file():
        raise LayerPruneError(f"{name_or_path} is no model: it has no config.json; give a model folder or a Hub id")
    try:
        config = AutoConfig.from_pretrained(resolve(name_or_path), **_options(name_or_path, kwargs))
        check_supported(config)
        plan_of(config)
    except LayerPruneError as error:
        raise LayerPruneError(f"{name_or_path}: {error}") from None
    except LOADING_ERRORS as error:
        raise LayerPruneError(f"{name_or_path} cannot be loaded as a model: {first_line(error)}") from error
    return config


def load_model(
    name_or_path: str,
    dtype: str | torch.dtype = "auto",
    for_device: str | torch.device | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub, safetensors only.

    Args:
        name_or_path (`str`): local folder, or Hub id, maybe with a revision: `"user/name@28-layers"`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): dtype of the weights in memory; `"auto"` is
            the checkpoint's own.
        for_device (`str` or `torch.device`, *optional*): where the model will compute. `"auto"` is then float32 if
            that is a CPU which would have to emulate the checkpoint's dtype.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        [`LayerPruneError`]: if there is no model, its architecture is not supported, or its weights do not fit its
            config (no tensor is ever left random).
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LayerPruneError(f"dtype={dtype!r} is unknown; choose auto, float32, bfloat16 or float16")
    keep_models_whole()
    config = load_config(name_or_path, **beside_weights(kwargs))
    if dtype == "auto" and for_device is not None:
        dtype = native_dtype(config.dtype, torch.device(for_device)) or "auto"
    try:
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve(name_or_path), **options, **_options(name_or_path, kwargs)
        )
    except LOADING_ERRORS as error:
        raise LayerPruneError(f"{name_or_path} cannot be loaded as a model: {first_line(error)}") from error
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])})
    if wrong:
        raise LayerPruneError(f"{name_or_path}: weights do not fit the config: {', '.join(wrong[:5])}")
    return model


def keep_models_whole() -> None:
    """Keep the engine that a process was launched with from loading models in parts: each process has whole models of
    its own here, but for the student while an engine trains it.

    Raises:
        [`LayerPruneError`]: where FSDP would load them on the first process only.
    """
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()  # by which transformers knows of it
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise LayerPruneError(
            "fsdp_cpu_ram_efficient_loading leaves every process but the first without a teacher; set it to false"
        )


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        [`LayerPruneError`]: if there is none.
    """
    folder = Path(resolve(name_or_path))
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty tokenizer without a word
        raise LayerPruneError(
            f"{name_or_path} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); save one beside the model"
        )
    kwargs = _options(name_or_path, kwargs)
    # beside a model of type qwen2 AutoTokenizer takes every tokenizer for Qwen2's; a converted model has another
    loader = PreTrainedTokenizerFast if _is_converted(name_or_path, kwargs) else AutoTokenizer
    try:
        return loader.from_pretrained(resolve(name_or_path), **kwargs)
    except LOADING_ERRORS as error:
        raise LayerPruneError(
            f"{name_or_path} has no tokenizer that can be loaded; save one beside the model or name another"
        ) from error


def _is_converted(name_or_path: str, kwargs: dict[str, Any]) -> bool:
    """Whether a model came from another family by [`~conversion.convert`]."""
    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    try:
        values, _ = PretrainedConfig.get_config_dict(resolve(name_or_path), **hub)
    except LOADING_ERRORS:
        return False  # a folder with nothing but a tokenizer
    return values.get("converted_from") is not None
