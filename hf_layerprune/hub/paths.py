"""What may leave this machine: a run records settings and local paths in full, and few of them are pushed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import LayerPruneError
from ..loading import EMBEDDED, is_gguf
from ..tasks.evaluation import LM_EVAL

INPUTS = (
    "model", "teacher", "dataset", "eval_dataset", "calibration_dataset", "tasks", "plan", "chat_template_path",
    "prompts",
)  # fmt: skip
"""Settings that may name a file or folder of the author's."""
PUBLIC = frozenset((
    "model", "teacher", "dataset", "dataset_config", "dataset_split", "eval_dataset", "calibration_dataset",
    "tasks", "plan", "dtype", "lora_r", "lora_alpha", "target_num_layers", "target_latency",
    "target_num_parameters", "target", "edits", "max_group_size", "layers_per_round", "criterion", "one_shot",
    "race_confidence", "protect_first_layers", "protect_last_layers", "num_calibration_samples",
    "num_repair_samples", "num_eval_samples", "compensation", "heal", "trained_layers", "kl_weight", "beta",
    "hidden_weight", "lm_weight", "temperature", "loss_preset", "measure_speed", "pairs", "search", "num_samples",
    "batch_size", "max_steps", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
    "data_seed", "bf16", "fp16", "tf32", "compile_layers", "activation_offloading", "gradient_checkpointing",
    "use_cpu", "model_init_kwargs", "dataset_text_field", "dataset_num_proc", "dataloader_num_workers",
    "max_length", "truncation_mode", "packing", "packing_strategy", "padding_free", "completion_only_loss",
    "assistant_only_loss", "chat_template_path", "eos_token", "pad_token", "logging_steps", "save_strategy",
    "save_steps", "save_total_limit", "healing_text", "tasks_text", "calibration_text", "repair_text",
    "evaluation_text", "save_dtype", "num_processes", "prompts", "on_policy_steps", "on_policy_tokens",
    "on_policy_learning_rate",
))  # fmt: skip
"""Settings that are pushed: those that decide the result and name nothing of the author's. All others stay here."""
OF_LOADING = frozenset(("revision", "subfolder", "gguf_file", "dtype", "attn_implementation"))
"""Entries of `model_init_kwargs` that are pushed."""
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
"""Files with words of every text there is, `/app` and `/home` among them."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def absolute_if_local(name: str) -> str:
    """The absolute path of a file or folder on this disk, and any other name as it is.

    A run records its inputs like this: it may be pushed from another folder, where the same name means something else.
    """
    own = name == EMBEDDED or name.startswith(EMBEDDED + ":")
    return os.path.abspath(name) if not own and os.path.exists(name) else name


def with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the inputs on this disk as absolute paths."""
    named = {key: settings[key] for key in INPUTS if isinstance(settings.get(key), str)}
    absolute = {key: absolute_if_local(name) for key, name in named.items()}
    if "tasks" in named:
        absolute["tasks"] = _each_task(
            named["tasks"], lambda name: os.path.abspath(name) if os.path.isfile(name) else name
        )
    return settings | absolute


def _each_task(tasks: str, change: Callable[[str], str]) -> str:
    """`tasks` with a change of the name or file of each, where lm-eval's begin with `lm_eval:`."""
    parts = [tasks] if os.path.isfile(tasks) else [part.strip() for part in tasks.split(",")]
    of_lm_eval = (LM_EVAL if part.startswith(LM_EVAL) else "" for part in parts)
    return ",".join(start + change(part.removeprefix(start)) for start, part in zip(of_lm_eval, parts, strict=True))


def is_local_path(text: str) -> bool:
    """Whether `text` is a path on a machine rather than a name that means the same everywhere."""
    local = text.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or PureWindowsPath(text).is_absolute()
    return local and "\n" not in text


def hub_id(name: str | None) -> str | None:
    """The repository on the Hub that `name` means, with a revision or a GGUF file or without; `None` for others."""
    if name is None or is_local_path(name):
        return None
    if is_gguf(name):  # user/name/file.gguf
        name = "/".join(name.split("/")[:2]) if name.count("/") > 1 else ""
    return name.split("@")[0] if HUB_ID.fullmatch(name) else None


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that may be pushed, with every local path replaced by its last part."""
    public = {name: without_local_paths(settings[name]) for name in settings if name in PUBLIC}
    if isinstance(tasks := settings.get("tasks"), str):
        public["tasks"] = _each_task(tasks, without_local_paths)
    if (kwargs := public.pop("model_init_kwargs", None)) and isinstance(kwargs, dict):
        public["model_init_kwargs"] = {name: kwargs[name] for name in kwargs if name in OF_LOADING}
    return public


def without_local_paths(value: Any) -> Any:
    """Replace every local path in a value, at any depth, by its last part."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(item) for item in value]
    local = isinstance(value, str) and is_local_path(value)
    return PureWindowsPath(PurePosixPath(value).name).name if local else value


def check_nothing_local(folder: Path, places: Iterable[Path], token: str | None) -> None:
    """Raise [`LayerPruneError`] if a text file in `folder` contains the path of one of `places`, or any token."""
    roots = {str(form) for place in places for form in (place.absolute(), place.resolve()) if len(form.parts) > 1}
    local = re.compile(rf"(?<![\w.:-])({'|'.join(map(re.escape, sorted(roots)))})(?![\w.-])")
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.suffix in (".safetensors", ".png", ".whl"):
            continue
        text, what = path.read_text(encoding="utf-8", errors="replace"), None
        if (token and token in text) or TOKEN.search(text):
            what = "an access token"
        elif roots and path.name not in VOCABULARY and (found := local.search(text)):
            what = f"the local path {found[0]}"
        if what:
            raise LayerPruneError(f"{path.name} holds {what}; take it out of the run's files, then push again")
