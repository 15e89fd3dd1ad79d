"""`hf-layerprune compress`: the whole loop."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from ..budget import TARGETS
from ..data import ASSETS
from ..errors import LayerPruneError, first_line
from ..loading import beside_weights, load_config
from ..progress import Phases, RunProgress, StopOnSignal, say
from ..rows import select_text_column
from ..surgery import plan_of
from ..trainer import IterativeLayerDistillConfig, IterativeLayerDistillTrainer
from ..trainer.trainable import lora_config
from .arguments import CompressArguments, default_depth
from .common import check_new_folder, check_sources, print_run, read_dataset, writable, write_recipe
from .parsing import Parser


def compress(argv: list[str]) -> None:
    """Rounds of score, remove, heal, evaluate; see [`IterativeLayerDistillTrainer`]."""
    began = time.perf_counter()
    parser = Parser("compress")
    arguments, config = parser.read(with_default_recipe(argv))
    init_kwargs = config.model_init_kwargs or {}
    set_default_target(config, load_config(arguments.model, **beside_weights(init_kwargs)).num_hidden_layers)
    _check_report_to(config.report_to)
    folder = Path(config.output_dir)
    if not arguments.resume:
        check_new_folder(folder, "resume the run in it with --resume true, or ")
    config.disable_tqdm = True
    config.model_init_kwargs = {"dtype": arguments.dtype} | init_kwargs
    with Phases(quiet=config.process_index != 0) as phases:
        with writable(folder):
            trainer = _trainer(arguments, config, phases)
            say(phases.console, headline(arguments, config, plan_of(trainer.start).depth))
            trainer.seconds_before = time.perf_counter() - began
            trainer.open_run(arguments.resume)
        if config.should_save and not trainer.file.is_done:
            kept = {name: value for name, value in init_kwargs.items() if name != "token"}  # that is the user's alone
            changed = {"model_init_kwargs": kept} if init_kwargs else {}
            write_recipe(folder, parser.given, model=arguments.model, **changed)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(RunProgress(trainer, phases))
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            try:
                trainer.train()
            except KeyboardInterrupt:
                if not trainer.is_world_process_zero():
                    raise
                line = resume_line(folder, trainer.accelerator.num_processes)
                raise KeyboardInterrupt(f"what is done is kept; to continue: {line}") from None
        print_run(trainer.run, phases.out, folder, "student")


def with_default_recipe(argv: list[str]) -> list[str]:
    """Without a model, the recipe of the embedded one."""
    if {"--model", "--config"} & {word.partition("=")[0] for word in argv}:
        return argv
    return ["--config", str(ASSETS / "recipe.yaml"), *argv]


def set_default_target(config: IterativeLayerDistillConfig, depth: int) -> None:
    """Where no target is given, three quarters of the depth."""
    if config.budget is None:
        config.target_num_layers = default_depth(depth)
        config.settle()


def headline(arguments: CompressArguments, config: IterativeLayerDistillConfig, depth: int) -> str:
    """What a run is about to do, in a line."""
    unit, target = config.budget.unit, config.budget.target
    goal = f"{depth} -> {target} layers" if unit == "depth" else f"{depth} layers to {TARGETS[unit]} {target:,}"
    return f"{arguments.model}, {goal}, on {arguments.dataset or 'the embedded text'}, into {config.output_dir} ..."


def resume_line(folder: Path, processes: int) -> str:
    """The command that resumes a run; the other options of a launcher are for the user to repeat."""
    options = "" if processes == 1 else " (with the options it was launched with)"
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    start = "hf-layerprune"
    if processes > 1:
        start = f"accelerate launch --num_processes {processes} -m hf_layerprune.cli"
    return f"{start} compress --config {recipe} --resume true{options}"


def _check_report_to(names: list[str]) -> None:
    """Raise [`LayerPruneError`] if the package of a tracker is missing, before a model is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except (RuntimeError, ValueError, ImportError) as error:
        raise LayerPruneError(f"report_to={','.join(names)}: {first_line(error)}") from error


def _trainer(
    arguments: CompressArguments, config: IterativeLayerDistillConfig, phases: Phases
) -> IterativeLayerDistillTrainer:
    phases.phase("reading the text")
    train, held_out, calibration = _datasets(arguments, config.dataset_text_field, config.seed)
    phases.phase(f"loading {arguments.model}")
    return IterativeLayerDistillTrainer(
        model=arguments.model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        calibration_dataset=calibration,
        teacher=arguments.teacher,
        prompt_dataset=read_dataset(arguments, arguments.prompts) if arguments.prompts else None,
        peft_config=lora_config(arguments.lora_r, arguments.lora_alpha),
    )


def _datasets(arguments: CompressArguments, text_field: str, seed: int) -> tuple[Any, Any, Any]:
    """Healing, held-out and calibration text. `None` for calibration: rows of the healing text."""

    def load(source: str) -> Any:
        return select_text_column(read_dataset(arguments, source), text_field, source)

    check_sources(arguments, arguments.eval_dataset, arguments.calibration_dataset, arguments.prompts)
    if arguments.dataset is None:
        train, held_out = load("embedded:healing"), load(arguments.eval_dataset or "embedded:held_out")
        return train, held_out, load(arguments.calibration_dataset or "embedded:calibration")
    train = load(arguments.dataset)
    calibration = load(arguments.calibration_dataset) if arguments.calibration_dataset else None
    if arguments.eval_dataset:
        return train, load(arguments.eval_dataset), calibration
    if len(train) < 2:
        raise LayerPruneError(f"dataset {arguments.dataset} has one row; give more, or --eval_dataset")
    split = train.train_test_split(test_size=max(1, min(1000, len(train) // 10)), seed=seed)
    return split["train"], split["test"], calibration
