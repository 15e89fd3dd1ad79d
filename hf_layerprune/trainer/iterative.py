"""Iterative layer-wise distillation: score, remove, heal, evaluate, until the student is shallow enough.

https://huggingface.co/papers/2511.05085. Each round scores the CURRENT student against the ORIGINAL teacher, removes
the layer that costs least (or runs it beside its neighbour), and heals the student against the original teacher.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from .._trl import prepared_for_evaluation, restore_forward
from ..budget import Goal
from ..data import Batch, check_batches, collated_batches, num_positions
from ..errors import LayerPruneError, first_line
from ..evaluation import evaluate_model
from ..hub import TAGS
from ..hub.paths import absolute_if_local
from ..loading import beside_weights, gguf_name, keep_models_whole, load_model, load_tokenizer, name_of, saved_dtype
from ..matching import with_plan
from ..record import RunRecord, read_plan
from ..rows import column_names, tell_of_dropped, with_text
from ..surgery import plan_of, prune, unshare_parameters
from ..tasks import load_tasks, prepare_tasks
from .checks import check_added_tokens, check_arguments, check_budget, check_enough_rows, check_request
from .config import IterativeLayerDistillConfig
from .engines import agreed, check_engine, check_whole, on_main, splits_model
from .interrupts import explained
from .publishing import HubPublishing
from .rounds import Rounds
from .run import RunFile, check_not_past_target, decisive_settings
from .students import check_saving, unpruned
from .towers import without_adapters


class IterativeLayerDistillTrainer(HubPublishing, SFTTrainer):
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
        self.goal: Goal | None = None  # what students are measured by; made when the run is opened
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

        self.file: RunFile | None = None
        self._opened = False
        self._peft_config = peft_config
        self.round = 0  # the round in progress, from 1
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
        self.tasks = []
        if args.tasks:
            rows = args.per_device_eval_batch_size
            self.tasks = prepare_tasks(load_tasks(args.tasks), self.start, processing_class, rows)
        self.seconds_before = time.perf_counter() - began

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
        columns, name = set(column_names(dataset)), f"{dataset_name} data"
        has_completions = {"prompt", "completion"} <= columns
        if args.completion_only_loss is None and formatting_func is None:
            self.completion_only_loss = has_completions  # of each data set; TRL's is that of the training data
        is_marked = has_completions or columns & {"completion_mask", "labels"}
        if args.completion_only_loss and dataset_name == "train" and not is_marked:
            raise LayerPruneError(
                f"completion_only_loss=True, but the {name} has columns {sorted(columns)}; bring prompt and "
                "completion, or leave it out"
            )
        cut = packing and args.packing_strategy == "bfd"  # which cuts rows, whatever is left of them
        try:
            how = (packing and not cut, formatting_func, dataset_name)
            rows = super()._prepare_dataset(dataset, processing_class, args, *how)
        except TemplateError as error:
            raise LayerPruneError(f"{name} does not fit the chat template: {first_line(error)}") from error
        if isinstance(rows, Dataset):
            if cut or not packing:
                tell_of_dropped(name, len(dataset) - len(rows), len(dataset), args.max_length)
            positions = num_positions(self.teacher.config)
            if args.max_length is None and max(map(len, rows["input_ids"])) > positions:
                raise LayerPruneError(
                    f"the {name} has rows of more tokens than the model has positions ({positions}), and "
                    "max_length=None does not cut them; set it"
                )
        return super()._prepare_dataset(rows, processing_class, args, True, None, dataset_name) if cut else rows

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
        except Exception as error:
            if (
                isinstance(error, LayerPruneError)
                or (clear := explained(error, self.file.folder, self.file.phase)) is None
            ):
                raise
            raise clear from error
        finally:
            self.teacher.train(was_training)
            self.file.close()

    def open_run(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Start a run in `args.output_dir`, or take up the one that is there; `train()` does it if you do not.

        Raises:
            [`LayerPruneError`]: see `train`; nothing has been written then.
        """
        folder, should_save = Path(self.args.output_dir), self.args.should_save
        self.file = RunFile(folder, should_save, self.args.device, self.seconds_before)
        on_main(self.accelerator, lambda: check_saving(unpruned(self.start), self.processing_class))
        batches = {
            "calibration": self.calibration_batches,
            "repair": self.repair_batches,
            "evaluation": self.eval_batches,
        }
        data = (self.all_train_rows, batches, self.tasks)
        settings = decisive_settings(self.args, self.start, self.teacher, *data, self._peft_config)
        settings |= {"save_dtype": str(self.save_dtype), "num_processes": self.accelerator.num_processes}
        try:
            on_main(self.accelerator, lambda: self.file.open(settings, resume_from_checkpoint))
            self.file.record = agreed(self.file.record)
            latency = self.run.latency
            goal = Goal.of(self.args.budget(), self.args.edit_space(), self.teacher, plan_of(self.teacher), latency)
            self.goal = agreed(goal)
            check_budget(self.model_name, self.goal, plan_of(self.start), self.args.heal)
            check_not_past_target(self.run, plan_of(self.start), self.goal)
            self.file.save("opened", latency=self.goal.latency)
        except BaseException:
            self.file.close()
            raise
        self._opened = True

    @property
    def run(self) -> RunRecord | None:
        """What the run has done so far; `None` before it is opened."""
        return None if self.file is None else self.file.record

    def metrics_of(self, student: PreTrainedModel, batches: list[Batch], prefix: str) -> dict[str, float]:
        """What `evaluate` returns."""
        report = evaluate_model(without_adapters(student), batches, self.teacher)
        return {f"{prefix}_{key}": value for key, value in report.to_dict().items()}

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
        metrics = self.metrics_of(self.model, batches, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the current student so that `from_pretrained` loads it."""
        if not splits_model(self.accelerator):
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # no engine holds it: it is whole on every process, and one writes it
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
