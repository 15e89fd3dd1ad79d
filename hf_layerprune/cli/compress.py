"""`hf-layerprune compress`: the whole loop."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from ..budget import TARGETS
from ..data import ASSETS
from ..errors import LayerPruneError, first_line
from ..files import write_atomically
from ..hub.paths import with_absolute_paths
from ..loading import beside_weights, load_config, load_tokenizer
from ..progress import Phases, RunProgress, say
from ..report import rich_table
from ..rows import with_text
from ..trainer import IterativeLayerDistillConfig, IterativeLayerDistillTrainer
from ..trainer.engines import launch_line
from ..trainer.interrupts import StopWhereNothingIsLost
from ..trainer.run_state import STATE_FILE
from ..trainer.trainable import lora_config
from .arguments import CompressArguments
from .parsing import check_new_folder, default_depth, names_given, names_option, parse
from .text import check_sources, read_dataset

NOT_IN_RECIPE = ("resume", "resume_from_checkpoint", "hub_token", "disable_tqdm")


def compress(argv: list[str]) -> None:
    """Rounds of score, remove, heal, evaluate; see [`IterativeLayerDistillTrainer`]."""
    began = time.perf_counter()
    argv = with_default_recipe(argv)
    arguments, config = parse("compress", argv)
    init_kwargs = config.model_init_kwargs
    if {"dtype", "torch_dtype"} & set(init_kwargs or {}):
        raise LayerPruneError(f"model_init_kwargs={init_kwargs} names a dtype; give it with --dtype")
    files = beside_weights({"trust_remote_code": config.trust_remote_code} | (init_kwargs or {}))
    choose_target(config, argv, load_config(arguments.model, **files).num_hidden_layers)
    config.disable_tqdm = True
    resume = {"true": True, "false": None, "none": None}.get(
        str(config.resume_from_checkpoint).lower(), config.resume_from_checkpoint
    )
    resume = True if arguments.resume else resume
    _check_report_to(config.report_to)
    folder = Path(config.output_dir)
    _check_output_folder(folder, resume)
    with Phases(quiet=config.process_index != 0) as phases:
        _compress(arguments, config, names_given(argv), resume, files, phases, began)


def _compress(
    arguments: CompressArguments,
    config: IterativeLayerDistillConfig,
    named: set[str],
    resume: Any,
    files: dict[str, Any],
    phases: Phases,
    began: float,
) -> None:
    """What is left to do once the settings are known to be good."""
    folder, init_kwargs = Path(config.output_dir), config.model_init_kwargs
    phases.phase("reading the text")
    train, held_out, calibration = _compress_datasets(arguments, config.dataset_text_field, config.seed)
    made_by_us = not folder.exists()
    phases.phase(f"loading {arguments.model}")
    config.model_init_kwargs = (init_kwargs or {}) | {"dtype": arguments.dtype}
    try:
        trainer = IterativeLayerDistillTrainer(
            model=arguments.model,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            calibration_dataset=calibration,
            processing_class=load_tokenizer(arguments.model, **files),
            teacher=arguments.teacher,
            peft_config=_lora(arguments),
        )
        trainer.seconds_before = time.perf_counter() - began
        trainer.open_run(resume)
    except BaseException:
        if made_by_us:  # Trainer makes the folder before all checks are done; an empty one helps nobody
            with suppress(OSError):
                folder.rmdir()
        raise
    config.model_init_kwargs = init_kwargs
    if config.should_save:
        _write_recipe(folder / "recipe.yaml", arguments, config, named)
    trainer.remove_callback(PrinterCallback)
    with StopWhereNothingIsLost() as stop, RunProgress(trainer, phases) as progress:
        trainer.add_callback(stop)
        trainer.add_callback(progress)
        try:
            trainer.train()
        except KeyboardInterrupt:
            if not trainer.is_world_process_zero():
                raise
            line = resume_line(folder, trainer.accelerator.num_processes)
            raise KeyboardInterrupt(f"what is done is kept; to go on: {line}") from None
    phases.out.print(rich_table(trainer.run))
    say(phases.out, f"student: {folder / 'model'}   report: {folder / 'report.md'}   plot: {folder / 'quality.png'}")


def resume_line(folder: Path, processes: int) -> str:
    """What to type to go on with a run; the other options of a launcher are for the user to repeat."""
    options = "" if processes == 1 else " (with the options it was launched with)"
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    return f"{launch_line(processes)} compress --config {recipe} --resume true{options}"


def with_default_recipe(argv: list[str]) -> list[str]:
    """Without a model, the recipe of the embedded one."""
    if any(names_option(argument, "--model", "--config") for argument in argv):
        return argv
    return ["--config", str(ASSETS / "recipe.yaml"), *argv]


def choose_target(config: IterativeLayerDistillConfig, argv: list[str], depth: int) -> None:
    """The target named on the command line, else that of the recipe, else three quarters of the depth."""
    if named := [name for name in TARGETS.values() if any(names_option(argument, f"--{name}") for argument in argv)]:
        for name in set(TARGETS.values()) - set(named):
            setattr(config, name, None)
    if config.budget() is None:
        config.target_num_layers = default_depth(depth)


def _check_report_to(names: list[str]) -> None:
    """Are the packages of the services there?"""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (RuntimeError, ValueError, ImportError) as error:
        raise LayerPruneError(f"report_to={','.join(names)}: {first_line(error)}") from error


def _check_output_folder(folder: Path, resume: Any) -> None:
    if resume and not (folder / STATE_FILE).is_file():
        raise LayerPruneError(f"output_dir={folder} holds no run to resume; start without --resume")
    if not resume:
        check_new_folder(folder, "resume the run in it with --resume true, or ")


def _compress_datasets(arguments: CompressArguments, text_field: str, seed: int) -> tuple[Any, Any, Any]:
    """Healing, held-out and calibration text. `None` for calibration: rows of the healing text."""

    def load(source: str) -> Any:
        return with_text(read_dataset(arguments, source), text_field, source)

    check_sources(arguments, arguments.eval_dataset, arguments.calibration_dataset)
    if arguments.dataset is None:
        train, held_out = load("embedded:healing"), load(arguments.eval_dataset or "embedded:held_out")
        return train, held_out, load(arguments.calibration_dataset or "embedded:calibration")
    train = load(arguments.dataset)
    calibration = load(arguments.calibration_dataset) if arguments.calibration_dataset else None
    if arguments.eval_dataset:
        return train, load(arguments.eval_dataset), calibration
    if len(train) < 2:
        raise LayerPruneError(
            f"dataset {arguments.dataset} has one row; give --eval_dataset or more rows to hold some out"
        )
    split = train.train_test_split(test_size=max(1, min(1000, len(train) // 10)), seed=seed)
    return split["train"], split["test"], calibration


def _lora(arguments: CompressArguments) -> Any:
    if arguments.lora_r is not None and arguments.lora_r < 1:
        raise LayerPruneError(f"lora_r={arguments.lora_r} is out of range; it must be at least 1")
    if arguments.lora_alpha < 1:
        raise LayerPruneError(f"lora_alpha={arguments.lora_alpha} is out of range; it must be at least 1")
    return lora_config(arguments.lora_r, arguments.lora_alpha)


def _write_recipe(
    path: Path, arguments: CompressArguments, config: IterativeLayerDistillConfig, named: set[str]
) -> None:
    """Write the settings that were given: `--config` repeats the run, from whichever folder, on whichever machine.

    What was derived from them on this machine, such as `bf16`, is derived again there.
    """
    values = vars(arguments) | config.as_given
    settings = {name: value for name, value in values.items() if name in named or name == "model"}
    settings = {name: value.value if isinstance(value, Enum) else value for name, value in settings.items()}
    for name in NOT_IN_RECIPE:
        settings.pop(name, None)
    for target in TARGETS.values():  # the command line may have replaced that of a recipe
        if getattr(config, target) is None:
            settings.pop(target, None)
    if isinstance(settings.get("model_init_kwargs"), dict):  # a token is for this machine alone
        settings["model_init_kwargs"] = {k: v for k, v in settings["model_init_kwargs"].items() if k != "token"}
    settings["output_dir"] = config.output_dir
    write_atomically(path, yaml.safe_dump(with_absolute_paths(settings), sort_keys=False))
