"""Iterative layer-wise distillation: score, remove, heal, evaluate, until the student is shallow enough.

https://huggingface.co/papers/2511.05085. Each round scores the CURRENT student against the ORIGINAL teacher, removes
the layer that costs least (or runs it beside its neighbour), and heals the student against the original teacher.
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints, set_seed

from .._trl import prepared_for_evaluation, restore_forward, swap_model
from ..budget import Gauge
from ..compensation import compensate
from ..data import Batch, check_batches, collated_batches
from ..edits import Edit
from ..errors import LayerPruneError, NotANumber
from ..evaluation import EvaluationReport, evaluate_model
from ..files import round_folder, write_atomically
from ..hub import TAGS, read_plan
from ..hub.paths import absolute_if_local
from ..loading import beside_weights, gguf_name, keep_models_whole, load_model, load_tokenizer, name_of, saved_dtype
from ..matching import with_plan
from ..plan import LayerPlan
from ..rows import with_text
from ..surgery import apply_plan, plan_of, prune, unshare_parameters
from .checkpoints import Checkpoint, drop_ruined_checkpoints, last_checkpoint, seal
from .checks import check_added_tokens, check_arguments, check_enough_rows, check_request
from .choosing import next_edit, prepared_tasks
from .config import IterativeLayerDistillConfig
from .engines import autocast, check_engine, check_whole
from .healing import LayerHealingTrainer
from .interrupts import explained
from .keeping import RunKeeping
from .publishing import HubPublishing
from .records import add_speed, round_record, speed_runs, task_record, teacher_record
from .run_state import RunState
from .students import publish_student
from .targets import trained_blocks
from .trainable import round_weights


class IterativeLayerDistillTrainer(RunKeeping, HubPublishing, LayerHealingTrainer):
    """Make a language model shallower, one measured and healed layer at a time.

    `train()` runs all rounds and leaves in `args.output_dir`: `rounds/NN/` (the student of each round), `model/` (the
    last one), `plan.json`, `report.json`, `report.md`, two plots and a card. A student is a plain model of
    its teacher's family, or [`PrunedQwen2ForCausalLM`] once layers run in parallel.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model to compress, by name (see [`load_model`]) or loaded; its weights are never changed, but a loaded
            model is moved to `args.device`. Loaded by name it is held in float32 and the students are saved in the
            checkpoint's own dtype; the numbers reported are those of the saved students.
        args ([`IterativeLayerDistillConfig`]):
            Settings; a target, such as `target_num_layers`, is required.
        train_dataset ([`~datasets.Dataset`]):
            Text to heal on, in any form [`~trl.SFTTrainer`] takes.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out text for every quality number. Without it they are measured on the calibration data.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Text to score layers on. By default the first rows of `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; by default the model's own.
        teacher (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Model to score and heal against, where `model` is a student already. By default `model` itself.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Heal with adapters on the trained layers; they are merged at the end of each round.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks of any [`~transformers.Trainer`], and [`LayerDistillCallback`]s that follow the rounds.
        kwargs: passed to [`~trl.SFTTrainer`] (`data_collator`, `formatting_func`, `optimizer_cls_and_kwargs`, ...).

    Raises:
        [`LayerPruneError`]: where the model, the data and the settings do not fit together.
    """

    _tag_names = list(TAGS)
    _name = "Iterative Layer-wise Distillation"
    _paper = {
        "title": "Iterative Layer-wise Distillation for Efficient Compression of Large Language Models",
        "id": "2511.05085",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: IterativeLayerDistillConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        calibration_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher: str | PreTrainedModel | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is None:
            raise LayerPruneError("train_dataset is missing; healing needs text")
        began = time.perf_counter()
        check_arguments(args, train_dataset, peft_config, teacher is not None, kwargs)
        keep_models_whole()
        files: dict[str, Any] = {}  # which files of that name, and with what right they are read
        if isinstance(model, str):
            init = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
            init |= args.model_init_kwargs or {}
            self.model_name = absolute_if_local(gguf_name(model, init.pop("gguf_file", None)))
            model = load_model(self.model_name, for_device=args.device, **init)
            files = beside_weights(init)
            self.save_dtype = saved_dtype(self.model_name, **files)
        else:
            self.model_name, self.save_dtype = absolute_if_local(name_of(model)), model.dtype
        if processing_class is None:
            if not self.model_name:
                raise LayerPruneError(
                    "processing_class is missing; the model was not loaded by name, give its tokenizer"
                )
            processing_class = load_tokenizer(self.model_name, **files)
        if isinstance(teacher, str):
            init = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
            init = {name: value for name, value in init.items() if name not in ("revision", "subfolder", "gguf_file")}
            teacher = load_model(teacher, **init | {"dtype": model.dtype})
        self.teacher_name = self.model_name if teacher is None else absolute_if_local(name_of(teacher))
        for given in (model, model if teacher is None else teacher):
            check_whole(given)
        if teacher is not None:
            model = with_plan(model, teacher, None if args.plan is None else read_plan(args.plan))
        self.teacher = (teacher if teacher is not None else model).to(args.device)
        self.start = model.to(args.device)  # what the first round starts from
        self.gauge: Gauge | None = None  # what students are measured by; made when the run is opened
        name, optimizer = self.model_name or type(model).__name__, kwargs.get("optimizer_cls_and_kwargs")
        check_request(name, self.start, self.teacher, args, processing_class, optimizer)
        datasets = {"train": train_dataset, "eval": eval_dataset, "calibration": calibration_dataset}
        self._text_field = args.dataset_text_field if kwargs.get("formatting_func") is None else None
        datasets = {
            name: with_text(dataset, self._text_field, f"{name}_dataset")
            for name, dataset in datasets.items()
            if dataset is not None
        }
        train_dataset = datasets.pop("train")

        self.run: RunState | None = None  # what train() has done: `run.teacher`, `run.rounds`
        self._opened = False
        self._lock: FileLock | None = None
        self._peft_config = peft_config
        self._round = 0
        args = copy.copy(args)  # the user's own stays as it is
        args.model_init_kwargs = None  # they have done their work; SFTTrainer would warn of them
        super().__init__(
            model=prune(self.start, [], share_weights=True),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=datasets or None,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        check_engine(self.accelerator, args)
        check_added_tokens(self.processing_class, self.start, args)
        restore_forward(self.model)
        self.all_train_rows = self.train_dataset
        datasets = self.eval_dataset or {}
        calibration = datasets.get("calibration", self.all_train_rows)
        self.eval_dataset = datasets.get("eval")
        self.calibration_batches = self._batches(calibration, args.num_calibration_samples, "calibration data")
        self.repair_batches = self.calibration_batches
        if args.num_repair_samples is not None:
            self.repair_batches = self._batches(calibration, args.num_repair_samples, "calibration data")
        if self.eval_dataset is None:
            self.eval_batches = self.calibration_batches
        else:
            self.eval_batches = self._batches(self.eval_dataset, args.num_eval_samples, "evaluation data")
        check_enough_rows(self.all_train_rows, args)
        self.tasks = prepared_tasks(args, self.start, processing_class)
        self.seconds_before = time.perf_counter() - began

    def _batches(self, rows: Dataset | IterableDataset, limit: int | None, what: str) -> list[Batch]:
        batches = collated_batches(rows, self.data_collator, self.args.per_device_eval_batch_size, limit)
        return check_batches(batches, self.start.config.vocab_size, what)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run the rounds until the student meets its target.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` (or the output folder) goes on with the run in `args.output_dir`, inside the round it was in.

        Raises:
            [`LayerPruneError`]: if the output folder holds a run and `resume_from_checkpoint` is not set, or the
                other way round; if the loss is no number. The rounds finished before stay on disk.
        """
        folder = Path(self.args.output_dir)
        run = self.run if self._opened else self.open_run(resume_from_checkpoint)
        self._opened = False
        was_training = self.teacher.training
        self.teacher.eval()
        try:
            return self._run_rounds(run, folder)
        except Exception as error:
            if (clear := explained(error, folder, self._doing)) is not None and not isinstance(error, LayerPruneError):
                raise clear from error
            raise
        finally:
            self.teacher.train(was_training)
            self._release_lock()

    def _run_rounds(self, run: RunState, folder: Path) -> TrainOutput:
        student, output = self._student_of(folder, run), TrainOutput(0, 0.0, {})
        swap_model(self, student)
        if not run.teacher:
            self._phase("evaluating teacher")
            report = evaluate_model(self.teacher, self.eval_batches, on_batch=self._phase_step)
            evaluated_on = "calibration data" if self.eval_dataset is None else "evaluation data"
            run.teacher = teacher_record(self.teacher_name, self.teacher, report, evaluated_on)
            run.teacher |= task_record(self.teacher, self.tasks, self.processing_class, self.teacher)
            self._save_run(run, folder, "evaluating teacher")
        while self.only_heals(run) or not self.gauge.met(plan_of(student)):
            self._round = len(run.rounds) + 1
            self._event("on_round_begin", number=self._round, depth=plan_of(student).depth)
            student = self._choose_and_edit(student, run, folder)
            student, output = self._heal(student, run, folder)
            self._finish_round(student, run, folder)
        if self.args.measure_speed and run.rounds and "decode_tokens_per_second" not in run.rounds[-1]:
            self._phase("measuring speed", num_runs=speed_runs(run.rounds))
            if self.args.should_save:
                add_speed(self.teacher, run.teacher, run.rounds, self.save_dtype, self._phase_step)
        self._save_run(run, folder, "all")
        self._phase("writing")
        self._publish(folder, run)
        if self.args.push_to_hub:
            self.push_to_hub()
        unshare_parameters(self.model.parameters())  # what the user does with it from here on is theirs
        self.accelerator.wait_for_everyone()
        return output

    def _choose_and_edit(self, student: PreTrainedModel, run: RunState, folder: Path) -> PreTrainedModel:
        """Make this round's edits, one at a time, each scored on what is left."""
        wanted = self.args.layers_per_round
        if self.gauge.budget.unit == "depth":
            wanted = min(wanted, plan_of(student).depth - self.gauge.budget.target)
        run.current = run.current or {"wanted": wanted, "edits": [], "scores": [], "seconds_scoring": 0.0}
        current = run.current
        for label in current["edits"]:
            student = self._edited(student, Edit.from_label(label))
        plan = plan_of(student)
        while len(current["edits"]) < current["wanted"] and not self.gauge.met(plan):
            self._phase("scoring", num_layers=plan.depth)
            start = time.perf_counter()
            with autocast(self.accelerator):  # what is compared is rounded alike, and scoring takes half of the time
                found = next_edit(
                    student,
                    self.calibration_batches,
                    gauge=self.gauge,
                    teacher=self.teacher,
                    args=self.args,
                    run=run,
                    on_batch=self._phase_step,
                    tasks=self.tasks,
                    tokenizer=self.processing_class,
                )
            label, scores = self._agreed(found)
            current["seconds_scoring"] += time.perf_counter() - start
            current["scores"] += [] if scores is None else [scores.to_dict()]
            current["edits"].append(label)
            student = self._edited(student, Edit.from_label(label))
            plan = plan_of(student)
            self._save_run(run, folder, "scoring")
        if "before_healing" not in current and self.args.heal:
            current["before_healing"] = current["unhealed"] = self._evaluate_phase(student).to_dict()
            if run.rounds or self.start is not self.teacher or self.args.compensation != "none":
                unhealed = apply_plan(self.teacher, plan, share_weights=True)
                current["unhealed"] = self._evaluate_phase(unhealed).to_dict()
            self._save_run(run, folder, "evaluating unhealed")
        return student

    def _edited(self, student: PreTrainedModel, edit: Edit) -> PreTrainedModel:
        """`student` after an edit, the gap repaired in closed form, in weights that the saved dtype can hold."""
        student = apply_plan(student, edit.apply(plan_of(student)), share_weights=True)
        if self.args.compensation != "none" and edit.kind == "remove":
            self._phase("repairing", num_layers=plan_of(student).depth)
            with autocast(self.accelerator):
                repair = (self.repair_batches, self.args.compensation, self.teacher, edit.layers)
                student = compensate(student, *repair, on_batch=self._phase_step, share_weights=True)
        round_weights(student, self.save_dtype)
        return student

    def _heal(self, student: PreTrainedModel, run: RunState, folder: Path) -> tuple[PreTrainedModel, TrainOutput]:
        """Train the student of this round; a checkpoint of an interrupted healing is taken up."""
        plan, current, target = plan_of(student), run.current, round_folder(folder, self._round)
        if "train_tokens" in current:  # a run that was interrupted behind its healing: the student is on disk
            return self._kept(run, folder), TrainOutput(0, 0.0, {})
        if not self.args.heal:
            return self._keep(student, run, folder), TrainOutput(0, 0.0, {})
        trained = self.args.named_trained_layers() or self.args.trained_layers
        edits = [Edit.from_label(label) for label in current["edits"]]
        blocks = trained_blocks(plan, edits, trained)
        set_seed(self.args.seed + self._round)  # adapters are drawn at random: the same ones after a resume
        self.train_dataset = self.all_train_rows.shuffle(seed=self.args.seed + self._round)  # other rows every round
        self._phase("healing", num_layers=plan.depth)
        checkpoint = self._on_main(lambda: last_checkpoint(target))
        self._healing_started = time.perf_counter() - (0.0 if checkpoint is None else checkpoint.seconds)
        try:
            student, output = self.heal(student, blocks, self.save_dtype, checkpoint)
        except NotANumber as error:
            raise NotANumber(f"{error}{self._on_main(lambda: self._what_is_left(target))}") from error
        seconds = time.perf_counter() - self._healing_started
        return self._keep(student, run, folder, int(self.state.num_input_tokens_seen), seconds), output

    def _what_is_left(self, target: Path) -> str:
        """Of the checkpoints of a ruined healing, for its message."""
        drop_ruined_checkpoints(target)
        if (left := last_checkpoint(target)) is None:
            return ""
        return f". {left.folder} is left to go on from; delete {target} to heal this round from the start"

    def _finish_round(self, student: PreTrainedModel, run: RunState, folder: Path) -> None:
        after = self._evaluate_phase(student)
        if not math.isfinite(after.loss):
            del run.current["train_tokens"]  # this healing does not count
            self._save_run(run, folder, "scoring")
            if self.args.should_save:
                shutil.rmtree(round_folder(folder, self._round))
            advice = "; lower the learning rate" if self.args.heal else ""
            raise LayerPruneError(
                f"round {self._round}: the student's loss is {after.loss}{advice}. The rounds before it are kept"
            )
        record = round_record(self._round, student, self.args.criterion, run.current, after)
        record |= task_record(student, self.tasks, self.processing_class, self.teacher)
        run.rounds.append(record)
        run.current = {}
        self._save_run(run, folder, "round")
        if self.args.should_save:
            self._write_report()
        self._event("on_round_end", record=record)

    def _publish(self, folder: Path, run: RunState) -> None:
        """Fill in what a user looks for first: the final model and its plan."""
        if self.args.should_save and run.rounds:
            self._write_report()
            self.create_model_card()
            files = [folder / name for name in ("README.md", "quality.png", "layers.png")]
            publish_student(round_folder(folder, len(run.rounds)), folder / "model", files)
            write_atomically(folder / "plan.json", LayerPlan.from_dict(run.rounds[-1]["plan"]).to_json() + "\n")

    def _evaluate_phase(self, student: PreTrainedModel) -> EvaluationReport:
        self._phase("evaluating", num_layers=plan_of(student).depth)
        return evaluate_model(student, self.eval_batches, self.teacher, on_batch=self._phase_step)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the current student: `eval_loss` (next-token, nats per token), `eval_perplexity`, `eval_kl`,
        `eval_agreement`, all weighted by tokens."""
        batches = self.eval_batches
        if eval_dataset is not None:
            eval_dataset = with_text(eval_dataset, self._text_field, "eval_dataset")
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            batches = self._batches(prepared_for_evaluation(self, eval_dataset, packing), None, "evaluation data")
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if is_peft_model(student) else student
        report = evaluate_model(student, batches, self.teacher)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in report.to_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """With a seal behind it, but for the last step: a `Trainer` that resumes there takes one more."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones stay until it is sealed
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        folder = self._get_output_dir(trial)
        if self.args.should_save and self.state.global_step < self.state.max_steps:
            seconds = time.perf_counter() - self._healing_started
            path = Path(folder, f"checkpoint-{self.state.global_step}")
            seal(Checkpoint(str(path), self.balance.weight, seconds))
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)
        self._save_run(self.run, Path(self.args.output_dir), "checkpoint", step=self.state.global_step)

    def _get_output_dir(self, trial: Any) -> str:
        """Checkpoints of a healing lie in the folder of its round."""
        folder = Path(self.args.output_dir)
        return str(round_folder(folder, self._round) if self._round else folder)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | {"round": self._round} if self._round else logs, *args, **kwargs)
