"""Iterative layer-wise distillation: score, remove, heal, evaluate, until the student is shallow enough.

https://huggingface.co/papers/2511.05085. Each round scores the CURRENT student against the ORIGINAL teacher, removes
the layer that costs least (or runs it in parallel with its neighbour), and heals the student against the original
teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, HfApi
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TrackioCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from .._trl import restore_forward
from ..budget import Goal
from ..data import Batch, check_batches, check_length
from ..errors import LayerPruneError, arguments_in_one_line, first_line, is_disk_full
from ..evaluation import evaluate_model
from ..files import write_atomically
from ..forward import check_same_vocabulary, check_tokenizer
from ..hub import TAGS, load_run, push_run, run_card
from ..hub.paths import absolute_if_local
from ..hub.runs import hub_errors
from ..loading import (
    beside_weights,
    gguf_name,
    keep_models_whole,
    load_model,
    load_tokenizer,
    name_of,
    saved_dtype,
    with_plan,
)
from ..record import RunRecord, read_plan
from ..rows import check_special_tokens, column_names, select_text_column, warn_of_dropped_rows
from ..scoring import MEASURED
from ..surgery import check_in_memory, check_made_from, plan_of, prune, unshare_parameters
from ..tasks import prepare_tasks
from .callbacks import TrackioRounds, hub_tags
from .config import IterativeLayerDistillConfig, settled
from .engines import broadcast_from_main, check_engine, on_main, splits_model, without_adapters
from .healing import check_overrides
from .on_policy import prompts_to_answer
from .rounds import Rounds
from .run import RunFile, check_budget, check_saving, decisive_settings, student_to_begin_with
from .trainable import check_healing, check_optimizer, check_trained_layers

Model = str | Path | PreTrainedModel


class IterativeLayerDistillTrainer(SFTTrainer):
    """Make a language model shallower, one measured and healed layer at a time.

    `train()` runs all rounds and leaves in `args.output_dir`: `rounds/NN/` (the student of each round), `model/` (the
    last one), `plan.json`, `report.json`, `report.md`, two plots and a card. A student is a plain model of its
    teacher's family, or [`PrunedQwen2ForCausalLM`] once layers run in parallel. With `push_to_hub=True` the repository
    is found or made before the training starts, and the last student is pushed when the run is done.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            The model to compress, by name (see [`load_model`]) or loaded; its weights are never changed, but a loaded
            model is moved to `args.device`. Loaded by name it is held in float32 and the students are saved in the
            checkpoint's own dtype; the numbers reported are those of the saved students.
        args ([`IterativeLayerDistillConfig`]): settings; a target, such as `target_num_layers`, is required.
        train_dataset ([`~datasets.Dataset`]): text to heal on, in any form [`~trl.SFTTrainer`] takes.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out text for every quality number. Without it they are measured on the calibration data.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Text to score layers on. By default the first rows of `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*): by default the model's own tokenizer.
        teacher (`str`, `Path` or [`~transformers.PreTrainedModel`], *optional*):
            Model to score and heal against, where `model` is a student already. By default `model` itself.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Heal with adapters on the trained layers; they are merged at the end of each round.
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks of any [`~transformers.Trainer`], and [`LayerDistillCallback`]s that follow the rounds.
        data_collator, formatting_func, optimizer_cls_and_kwargs (*optional*): as in [`~trl.SFTTrainer`].
        prompt_dataset ([`~datasets.Dataset`], *optional*):
            Prompts that the student answers in the last round, with `args.on_policy_steps`: a column `messages`,
            `prompt` or `text`. Texts are a user's message where the tokenizer has a chat template.

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
        model: Model,
        args: IterativeLayerDistillConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        calibration_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher: Model | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        data_collator: DataCollator | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        prompt_dataset: Dataset | None = None,
    ) -> None:
        began = time.perf_counter()
        check_overrides(type(self))
        args = settled(args)  # the user's own stays as it is
        files = self._load(model, teacher, args)
        if processing_class is None:
            processing_class = load_tokenizer(self.model_name, **files)
        self._check_request(args)
        if args.heal:
            with arguments_in_one_line():
                check_healing(self.start, args, peft_config)
        check_tokenizer(processing_class, self.start, self.model_name or "the model")
        self._text_field = args.dataset_text_field if formatting_func is None else None
        given = {"train": train_dataset, "eval": eval_dataset, "calibration": calibration_dataset}
        given = {name: rows for name, rows in given.items() if rows is not None}
        texts = {name: select_text_column(rows, self._text_field, f"{name}_dataset") for name, rows in given.items()}
        check_special_tokens(texts, processing_class, args)
        self.file: RunFile | None = None
        self.goal: Goal | None = None  # what students are measured by; made when the run is opened
        self._opened, self._peft_config = False, peft_config
        self.round = 0  # the round in progress, from 1
        args.model_init_kwargs = None  # they have done their work; SFTTrainer would warn of them
        args.run_name = args.run_name or Path(args.output_dir).absolute().name  # one run of a tracker for all rounds
        with arguments_in_one_line():
            super().__init__(
                model=prune(self.start, [], share_weights=True),
                args=args,
                train_dataset=texts.pop("train", None),
                eval_dataset=texts or None,
                processing_class=processing_class,
                callbacks=callbacks,
                data_collator=data_collator,
                formatting_func=formatting_func,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            )
            if args.heal and optimizer_cls_and_kwargs is None:  # known before a layer is scored
                check_optimizer(self.get_optimizer_cls_and_kwargs(args, self.model))
        check_engine(self.accelerator, args)
        check_tokenizer(self.processing_class, self.start, self.model_name or "the model")  # with its chat template
        restore_forward(self.model)
        callbacks = self.callback_handler.callbacks
        callbacks[:] = [TrackioRounds() if type(one) is TrackioCallback else one for one in callbacks]
        self._make_batches(self.eval_dataset or {})
        self.prompts = prompts_to_answer(prompt_dataset, self.processing_class, self.start, args)
        named = args.tasks or ("default" if args.criterion == "tasks" else None)
        size = args.per_device_eval_batch_size
        self.tasks = prepare_tasks(named, self.start, processing_class, size) if named else []
        self.seconds_before = time.perf_counter() - began

    def _load(self, model: Model, teacher: Model | None, args: IterativeLayerDistillConfig) -> dict[str, Any]:
        """Load what is given by name; returns how the files next to the model's weights are read."""
        keep_models_whole()
        loaded = [one for one in (model, teacher) if isinstance(one, PreTrainedModel)]
        check_in_memory(*loaded)
        init = args.init_kwargs(is_loaded=isinstance(model, PreTrainedModel) and teacher in (None, *loaded))
        file, files = init.pop("gguf_file", None), beside_weights(init)
        if isinstance(model, (str, Path)):
            self.model_name = absolute_if_local(gguf_name(str(model), file))
            model = load_model(self.model_name, for_device=args.device, **init)
            self.save_dtype = saved_dtype(self.model_name, **files)
        else:
            self.model_name, self.save_dtype = absolute_if_local(name_of(model)), model.dtype
        if isinstance(teacher, (str, Path)):
            init = {name: value for name, value in init.items() if name not in ("revision", "subfolder")}
            teacher = load_model(teacher, **init | {"dtype": model.dtype})
        if teacher is None and args.plan is not None:
            raise LayerPruneError(f"plan={args.plan!r} says which layers of a teacher the model has; give the teacher")
        self.teacher_name = self.model_name
        if teacher is not None:
            self.teacher_name = absolute_if_local(name_of(teacher))
            model = with_plan(model, teacher, None if args.plan is None else read_plan(args.plan))
        self.start = model.to(args.device)  # what the first round starts from
        self.teacher = self.start if teacher is None else teacher.to(args.device)
        return files

    def _check_request(self, args: IterativeLayerDistillConfig) -> None:
        name = self.model_name or type(self.start).__name__
        plan, teacher_plan = plan_of(self.start), plan_of(self.teacher)
        if args.budget is None:
            raise LayerPruneError(
                f"target_num_layers is missing: how many of {name}'s {plan.depth} layers are to stay?"
            )
        check_same_vocabulary(self.start, self.teacher)
        check_length(args.max_length, self.start.config, name)
        check_length(args.max_length, self.teacher.config, "the teacher")
        if plan.parallel_pairs and args.criterion not in MEASURED:
            raise LayerPruneError(
                f"criterion={args.criterion!r} judges single layers, but {list(plan.parallel_pairs)} run in parallel; "
                f"choose one of {', '.join(MEASURED)}"
            )
        check_made_from(self.start, self.teacher, by_layers=True)
        check_trained_layers(args.trained_layers, plan, name)
        if args.budget.unit != "latency":  # which is measured when the run is opened
            check_budget(name, Goal.of(args.budget, args.edit_space, self.teacher, teacher_plan), plan, args.heal)

    def _make_batches(self, datasets: dict[str, Dataset]) -> None:
        args, self.all_train_rows = self.args, self.train_dataset
        if args.heal and isinstance(self.all_train_rows, Dataset) and not len(self.all_train_rows):
            raise LayerPruneError("the training data makes no row; give more text, or a smaller max_length")
        calibration, self.eval_dataset = datasets.get("calibration", self.all_train_rows), datasets.get("eval")
        self.calibration_batches = self._batches(calibration, args.num_calibration_samples, "calibration data")
        self.repair_batches = self.eval_batches = self.calibration_batches
        if args.num_repair_samples is not None:
            self.repair_batches = self._batches(calibration, args.num_repair_samples, "calibration data")
        if self.eval_dataset is not None:
            self.eval_batches = self._batches(self.eval_dataset, args.num_eval_samples, "evaluation data")

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: IterativeLayerDistillConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Tokenize as TRL does, which leaves out rows without a token that counts: here with a warning, and also
        before rows are packed."""
        if args.completion_only_loss is None and formatting_func is None:  # TRL's is that of the training data
            self.completion_only_loss = {"prompt", "completion"} <= set(column_names(dataset))
        cut = packing and args.packing_strategy == "bfd"  # which cuts rows, whatever is left of them
        rows = super()._prepare_dataset(
            dataset, processing_class, args, packing and not cut, formatting_func, dataset_name
        )
        if isinstance(rows, Dataset) and (cut or not packing):
            warn_of_dropped_rows(f"{dataset_name} data", len(dataset) - len(rows), len(dataset), args.max_length)
        return super()._prepare_dataset(rows, processing_class, args, True, None, dataset_name) if cut else rows

    def _batches(self, rows: Dataset | IterableDataset, limit: int | None, what: str) -> list[Batch]:
        """The first `limit` rows; a collator that puts those of a batch end to end gets one at a time, to measure."""
        columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in column_names(rows)]
        rows = rows.select_columns(columns)
        rows = rows if limit is None else rows.take(limit)
        size = 1 if getattr(self.data_collator, "padding_free", False) else self.args.per_device_eval_batch_size
        batches = DataLoader(rows, batch_size=size, collate_fn=self.data_collator)
        return check_batches(batches, self.start.config.vocab_size, what)

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run the rounds until the student meets its target.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                `True` (or the output folder) continues the run in `args.output_dir`, inside the round it was in.

        Raises:
            [`LayerPruneError`]: if the output folder holds a run and `resume_from_checkpoint` is not set, or the
                other way round; if the loss is not finite. The rounds finished before stay on disk.
        """
        if not self._opened:
            self.open_run(resume_from_checkpoint)
        self._opened = False
        was_training = self.teacher.training
        self.teacher.eval()
        try:
            output = Rounds(self).train()
            if self.args.push_to_hub:
                self.push_to_hub()
            unshare_parameters(self.model.parameters())  # what the user does with it from here on is theirs
            self.accelerator.wait_for_everyone()
            return output
        except Exception as error:  # instead of the operating system's own
            if not is_disk_full(error) or getattr(error, "filename", None):
                raise
            raise LayerPruneError(f"{self.args.output_dir} cannot be written: {first_line(error)}") from error
        finally:
            self.teacher.train(was_training)
            self.file.close()

    def open_run(self, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Start a run in `args.output_dir`, or open the one that is there; `train()` does it if you do not.

        Raises:
            [`LayerPruneError`]: see `train`; nothing has been written then.
        """
        args, start, teacher = self.args, self.start, self.teacher
        self.file = RunFile(Path(args.output_dir), args.should_save, args.device, self.seconds_before)
        on_main(self.accelerator, lambda: check_saving(student_to_begin_with(start), self.processing_class))
        batches = {"calibration": self.calibration_batches, "repair": self.repair_batches}
        batches["evaluation"] = self.eval_batches
        settings = decisive_settings(args, start, teacher, self.all_train_rows, batches, self.tasks, self._peft_config)
        settings |= {"save_dtype": str(self.save_dtype), "num_processes": self.accelerator.num_processes}
        try:
            on_main(self.accelerator, lambda: self.file.open(settings, resume_from_checkpoint))
            run = self.file.record = broadcast_from_main(self.file.record)
            goal = Goal.of(args.budget, args.edit_space, teacher, plan_of(teacher), run.latency)
            self.goal = broadcast_from_main(goal)
            check_budget(self.model_name, self.goal, plan_of(start), args.heal)
            self.file.begin_run(settings, self.goal)
        except BaseException:
            self.file.close()
            raise
        self._opened = True

    @property
    def run(self) -> RunRecord | None:
        """What the run has done so far; `None` before it is opened."""
        return None if self.file is None else self.file.record

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the current student: `eval_loss` (next-token, nats per token), `eval_perplexity`, `eval_kl`,
        `eval_agreement`, all weighted by tokens."""
        batches = self.eval_batches
        if eval_dataset is not None:
            eval_dataset = select_text_column(eval_dataset, self._text_field, "eval_dataset")
            packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
            how = (self.processing_class, self.args, packing, self._formatting_func, "eval")
            batches = self._batches(self._prepare_dataset(eval_dataset, *how), None, "evaluation data")
        report = evaluate_model(without_adapters(self.model), batches, self.teacher)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in report.to_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise LayerPruneError("predict would keep the logits of every token; use evaluate(eval_dataset=...)")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the current student so that `from_pretrained` loads it."""
        if not splits_model(self.accelerator):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # no engine holds it: it is whole on every process, and one writes it
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, *args: Any, **options: Any) -> None:
        """Find the repository this run will be pushed to, or make it; arguments as in `Trainer`."""
        with hub_errors("push_to_hub"):
            super().init_hf_repo(*args, **options)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **options: Any,
    ) -> CommitInfo | Any:
        """Push the run in `args.output_dir`, from the main process; `options` are `round`, `depth_tags` and the like
        of [`push_run`]. Where nothing else is said, the `hub_*` settings count. Returns `CommitInfo`, or with
        `blocking=False` its `Future`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        args = self.args
        arguments = (args.output_dir, args.hub_model_id or Path(args.output_dir).absolute().name)
        options |= {"commit_message": commit_message, "base_model": self.model_name}
        options |= {"token": token or args.hub_token, "revision": revision or args.hub_revision}
        options |= {"private": args.hub_private_repo if private is None else private}
        options |= {"tags": [*hub_tags(self.model, self.run), *_as_list(tags)], "datasets": _as_list(dataset_name)}
        return push_run(*arguments, **options) if blocking else HfApi().run_as_future(push_run, *arguments, **options)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder, from what the run has measured so far."""
        folder = Path(self.args.output_dir)
        if self.args.should_save and self.run is not None and self.run.rounds:
            names = (model_name or f"{folder.name}/model", self.model_name, _as_list(tags))
            card = run_card(load_run(folder), len(self.run.rounds), *names, datasets=_as_list(dataset_name))
            write_atomically(folder / "README.md", str(card))


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
