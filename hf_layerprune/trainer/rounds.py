"""The rounds of iterative layer-wise distillation: choose, edit, heal, evaluate, until the plan meets the target."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput, set_seed
from transformers.utils import logging

from .._trl import set_model
from ..compensation import compensate
from ..errors import LayerPruneError, NotANumber
from ..evaluation import EvaluationReport, evaluate_model
from ..files import round_folder, write_atomically
from ..hub.paths import without_local_paths
from ..loading import load_model
from ..merging import edited, merge
from ..plan import Edit, LayerPlan
from ..record import PLAN_FILE, Healing, RoundInProgress, RoundRecord, RoundWork, RunRecord, TeacherRecord
from ..report import PLOTS
from ..scoring import MEASURED, Scores
from ..search import next_edit, order_of_removals
from ..surgery import apply_plan, plan_of, share_equal_weights
from ..tasks import TaskReport, evaluate_tasks
from .callbacks import LayerDistillCallback, hub_tags
from .engines import autocast, broadcast_from_main, on_main
from .healing import HealingTrainer
from .on_policy import heal_on_policy
from .run import publish_student, save_student, speed_runs, student_to_begin_with, with_speed
from .trainable import cast_weights, trained_blocks

if TYPE_CHECKING:
    from .iterative import IterativeLayerDistillTrainer

logger = logging.get_logger(__name__)

Heal = Callable[[PreTrainedModel, LayerPlan], tuple[PreTrainedModel, Healing]]


class Rounds:
    """The rounds of one call of `train()`. `trainer.file`, the run on disk, holds what is known of them.

    A run that resumes finds there what it need not repeat: the edits of the round in progress, the last whole
    checkpoint of its healing, or that the round is healed.
    """

    def __init__(self, trainer: IterativeLayerDistillTrainer) -> None:
        self.trainer, self.args, self.file = trainer, trainer.args, trainer.file
        self.teacher, self.goal = trainer.teacher, trainer.goal
        self.checkpoints = self.file.folder / "healing"  # of the round in progress
        self.output = TrainOutput(0, 0.0, {})  # of the last healing

    @property
    def run(self) -> RunRecord:
        return self.file.record

    def train(self) -> TrainOutput:
        """Run rounds until the plan meets the target."""
        student = self._load_student(len(self.run.rounds))
        plan = plan_of(student)
        self._evaluate_teacher()
        only_heals = not self.run.rounds and self.goal.met(plan)  # a student that has the depth already
        while only_heals or not self.goal.met(plan):
            only_heals = False
            for made in range(self._begin_round(plan)):
                if (edit := self._next_edit(student, made)) is None:
                    break
                plan = edit.apply(plan)
                if self.run.current.phase != "healed":  # else the student is on disk
                    student = self._edited(student, edit)
            self._evaluate_unhealed(student, plan)
            student = self._healed(student, plan, self._heal if self.args.heal else None)
            self._end_round(student, self._evaluate(student))
        if self.args.on_policy_steps and not self.run.rounds[-1].is_on_policy:
            self._train_on_policy(student, plan)
        self._finish()
        return self.output

    def _train_on_policy(self, student: PreTrainedModel, plan: LayerPlan) -> None:
        """Make a last round without an edit, which heals the student on its own answers."""
        self._begin_round(plan)
        if self.run.current.phase == "choosing":
            last = self.run.rounds[-1]
            self._change_round(phase="edited", before_healing=last.quality, unhealed=last.unhealed or last.quality)
        student = self._healed(student, plan, self._heal_on_policy)
        self._end_round(student, self._evaluate(student))

    def _load_student(self, number: int) -> PreTrainedModel:
        """The student of a round, or of round 0 the one that the run starts from."""
        if number:
            folder = round_folder(self.file.folder, number)
            student = load_model(str(folder), dtype=self.trainer.start.dtype).to(self.args.device)
        else:
            student = student_to_begin_with(self.trainer.start)
        share_equal_weights(student, self.teacher)
        set_model(self.trainer, student)
        return student

    def _evaluate_teacher(self) -> None:
        if self.run.teacher is not None:
            return
        self._phase("evaluating teacher")
        record = TeacherRecord.of(
            self.teacher,
            evaluate_model(self.teacher, self.trainer.eval_batches, on_batch=self._phase_step),
            tasks=self._evaluate_tasks(self.teacher),
            name=without_local_paths(self.trainer.teacher_name),
            evaluated_on="calibration data" if self.trainer.eval_dataset is None else "evaluation data",
        )
        self.file.save(teacher=record)

    def _begin_round(self, plan: LayerPlan) -> int:
        """Begin the next round, or continue the one in progress; returns how many edits it makes."""
        self.trainer.round = len(self.run.rounds) + 1
        self._event("on_round_begin", number=self.trainer.round, depth=plan.depth)
        current = self.run.current
        if current and current.phase == "edited" and not current.edits and self.run.rounds and not self.goal.met(plan):
            current = None  # an on-policy round was interrupted, and the target has been lowered since
        if current is None:
            wanted = self.args.layers_per_round
            if self.goal.budget.unit == "depth":
                wanted = min(wanted, plan.depth - self.goal.budget.target)
            self.file.record = replace(self.run, current=RoundInProgress(wanted))
        return self.run.current.wanted

    def _next_edit(self, student: PreTrainedModel, made: int) -> Edit | None:
        """Choose the next edit of this round, after `made` others; `None` if it makes no other."""
        current = self.run.current
        if made < len(current.edits):  # of a run that resumes
            return current.edits[made]
        if current.phase != "choosing" or self.goal.met(plan_of(student)):
            return None
        self._phase("scoring", num_layers=plan_of(student).depth)
        start = time.perf_counter()
        with autocast(self.trainer.accelerator):  # all candidates are rounded alike, in half of the time
            edit, scores, order = broadcast_from_main(self._choice(student))
        self.file.record = replace(self.run, order=order)
        self._change_round(
            edits=(*current.edits, edit),
            scores=current.scores if scores is None else (*current.scores, scores),
            seconds_scoring=current.seconds_scoring + time.perf_counter() - start,
        )
        return edit

    def _choice(self, student: PreTrainedModel) -> tuple[Edit, Scores[Edit] | None, tuple[Edit, ...]]:
        """The next edit; the scores it was chosen by, if this call scored; and the whole order, if those chose one."""
        args, plan = self.args, plan_of(student)
        # another draw of "random" in every round
        options: dict[str, Any] = {"seed": args.seed + plan.depth, "on_batch": self._phase_step}
        if args.criterion in MEASURED:  # the layer that will be repaired is the one to judge
            options |= {"compensation": args.compensation, "tasks": self.trainer.tasks}
            options |= {"tokenizer": self.trainer.processing_class}
        request = (args.criterion, self.teacher)
        batches, is_stretch = self.trainer.calibration_batches, args.criterion == "angular_distance"
        if not (args.one_shot or is_stretch):
            step = next_edit(student, batches, self.goal, *request, race=args.race, **options)
            return step.edit, step.scores, ()
        scores, order = None, self.run.order
        if not order:
            size = plan.depth - int(self.goal.budget.target) if args.one_shot else self.run.current.wanted
            scores, order = order_of_removals(student, batches, self.goal.space, *request, size, **options)
        if not (left := [edit for edit in order if edit.layers[0] in plan.layers]):
            raise LayerPruneError(
                f"criterion={args.criterion!r} with one_shot=True chose a stretch of {len(order)} layers, which are "
                "gone; a new run with the lower target chooses another"
            )
        return left[0], scores, order

    def _edited(self, student: PreTrainedModel, edit: Edit) -> PreTrainedModel:
        """The student after `edit`, its gap repaired in closed form, in weights that the saved dtype can hold."""
        batches, repairs = self.trainer.repair_batches, self.args.compensation != "none" and edit.kind == "remove"
        if repairs or edit.kind == "merge":
            self._phase("repairing" if repairs else "merging", num_layers=plan_of(student).depth - 1)
        with autocast(self.trainer.accelerator):
            student = edited(student, edit, batches, self.teacher, self._phase_step)
            if repairs:
                options = {"gaps": edit.layers, "on_batch": self._phase_step, "share_weights": True}
                student = compensate(student, batches, self.args.compensation, self.teacher, **options)
        cast_weights(student, self.trainer.save_dtype)
        return student

    def _edited_teacher(self, plan: LayerPlan) -> PreTrainedModel:
        """The teacher after all edits of `plan`, without repairs or healing."""
        before = plan.before_merges(plan_of(self.teacher))
        model = apply_plan(self.teacher, before, share_weights=True)
        if new := [block for block in plan.merged if block not in before.merged]:
            self._phase("merging", num_layers=plan.depth)
            batches, options = self.trainer.repair_batches, {"on_batch": self._phase_step, "share_weights": True}
            with autocast(self.trainer.accelerator):
                model = merge(model, new, batches, self.teacher, **options)
            cast_weights(model, self.trainer.save_dtype)
        return model

    def _evaluate_unhealed(self, student: PreTrainedModel, plan: LayerPlan) -> None:
        """Measure the student before its healing, and the teacher after the same edits without any training."""
        if not self.args.heal or self.run.current.phase != "choosing":
            return
        before = unhealed = self._evaluate(student)
        if self.run.rounds or self.trainer.start is not self.teacher or self.args.compensation != "none":
            unhealed = self._evaluate(self._edited_teacher(plan))
        self._change_round(phase="edited", before_healing=before, unhealed=unhealed)

    def _healed(self, student: PreTrainedModel, plan: LayerPlan, heal: Heal | None) -> PreTrainedModel:
        """The student of this round after its healing, if there is one, on disk."""
        trainer, number = self.trainer, self.trainer.round
        if self.run.current.phase == "healed":  # where the run was interrupted
            student = self._load_student(number)
        else:
            student, healing = heal(student, plan) if heal else (student, None)
            set_model(trainer, student)
            trainer.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = round_folder(self.file.folder, number)
                save_student(student, trainer.processing_class, trainer.save_dtype, folder)
            self._change_round(phase="healed", healing=healing)
            trainer.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return student

    def _heal(self, student: PreTrainedModel, plan: LayerPlan) -> tuple[PreTrainedModel, Healing]:
        """Train the student by a fresh trainer, from the last whole checkpoint if there is one."""
        trainer, number = self.trainer, self.trainer.round
        blocks = trained_blocks(plan, self.run.current.edits, self.args.trained_layers)
        set_seed(self.args.seed + number)  # adapters are drawn at random: the same ones after a resume
        rows = trainer.all_train_rows.shuffle(seed=self.args.seed + number)  # other rows every round
        self._phase("healing", num_layers=plan.depth)
        checkpoint = on_main(trainer.accelerator, self._last_checkpoint)
        before = self.run.current.healing.seconds if checkpoint else 0.0
        healing = HealingTrainer(trainer, student, blocks, rows, self.checkpoints, self._change_round)
        try:
            student, self.output = healing.heal(trainer.save_dtype, checkpoint, before)
        except NotANumber as error:  # it would diverge again from any checkpoint
            self._change_round(checkpoint=None, healing=None)
            on_main(trainer.accelerator, lambda: shutil.rmtree(self.checkpoints, ignore_errors=True))
            raise LayerPruneError(f"{error}. A run that resumes heals round {number} from its start") from error
        return student, healing.so_far

    def _heal_on_policy(self, student: PreTrainedModel, plan: LayerPlan) -> tuple[PreTrainedModel, Healing]:
        """Train the student on its own answers; a run that resumes begins this healing again."""
        blocks = trained_blocks(plan, [], self.args.trained_layers)
        self._phase("healing on policy", num_layers=plan.depth)
        return heal_on_policy(self.trainer, student, blocks, self.checkpoints)

    def _last_checkpoint(self) -> Path | None:
        """The checkpoint that the run names: it does so once all processes have written it. Others are deleted."""
        step = self.run.current.checkpoint
        if step is not None and (path := self.checkpoints / f"checkpoint-{step}").is_dir():
            return path
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        return None

    def _end_round(self, student: PreTrainedModel, quality: EvaluationReport) -> None:
        number, current = self.trainer.round, self.run.current
        if not math.isfinite(quality.loss):  # this healing does not count
            healed = current.healing is not None
            self._change_round(phase="edited" if healed else "choosing", checkpoint=None, healing=None)
            if self.args.should_save:
                shutil.rmtree(round_folder(self.file.folder, number))
            advice = "; lower the learning rate" if healed else ""
            raise LayerPruneError(
                f"round {number}: the student's loss is {quality.loss}{advice}. The rounds before it are kept"
            )
        record = RoundRecord.of(
            student,
            quality,
            tasks=self._evaluate_tasks(student),
            number=number,
            criterion=self.args.criterion,
            **{each.name: getattr(current, each.name) for each in fields(RoundWork)},
        )
        self.file.record = self.run.with_round(record)
        self.file.save(order=self.run.order if self.args.one_shot else ())
        self.file.report()
        self._event("on_round_end", record=record)
        if self.args.should_save and not self.args.lm_weight:  # which may lead away from the teacher on purpose
            self._warn_of_harm(record)

    def _warn_of_harm(self, record: RoundRecord) -> None:
        """Say so if healing, which was to bring the student nearer to the teacher, has done the opposite."""
        before = record.before_healing
        if before is None or record.is_on_policy or record.quality.kl <= before.kl:
            return
        logger.warning(
            f"round {record.number}: healing raised KL to the teacher from {before.kl:.3g} to "
            f"{record.quality.kl:.3g}; lower learning_rate (now {self.args.learning_rate:g}), or heal for more steps"
        )

    def _finish(self) -> None:
        """Measure the speed of every depth, and fill in what a user looks for first: the final model and its plan."""
        folder, last, is_writer = self.file.folder, self.run.rounds[-1], self.args.should_save
        if is_writer and self.args.measure_speed and last.speed is None:
            self._phase("measuring speed", num_runs=speed_runs(self.run))
            self.file.record = with_speed(self.run, self.teacher, self.trainer.save_dtype, self._phase_step)
        self.file.save()
        self._phase("writing")
        if is_writer:
            write_atomically(folder / PLAN_FILE, last.plan.to_json() + "\n")
        self._event("on_run_end", model=self.trainer.model)
        self.file.save(tags=hub_tags(self.trainer.model, self.run))
        if is_writer:
            self.file.report()
            self.trainer.create_model_card()
            files = [path for name in ("README.md", *PLOTS) if (path := folder / name).is_file()]
            publish_student(round_folder(folder, last.number), folder / "model", files)

    def _evaluate(self, student: PreTrainedModel) -> EvaluationReport:
        self._phase("evaluating", num_layers=plan_of(student).depth)
        return evaluate_model(student, self.trainer.eval_batches, self.teacher, on_batch=self._phase_step)

    def _evaluate_tasks(self, model: PreTrainedModel) -> TaskReport | None:
        if not (tasks := self.trainer.tasks):
            return None
        self._phase("evaluating tasks", **({} if model is self.teacher else {"num_layers": plan_of(model).depth}))
        tokenizer = self.trainer.processing_class
        return evaluate_tasks(model, tasks, tokenizer, self.teacher, on_chunk=self._phase_step)

    def _change_round(self, **changes: Any) -> None:
        """Change fields of the round in progress and save the run."""
        self.file.save(current=replace(self.run.current, **changes))

    def _phase(self, phase: str, **details: Any) -> None:
        self.file.begin(phase)
        self._event("on_phase_begin", phase=phase, **details)

    def _phase_step(self) -> None:
        self._event("on_phase_step")

    def _event(self, name: str, **details: Any) -> None:
        trainer = self.trainer
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, LayerDistillCallback):
                getattr(callback, name)(self.args, trainer.state, trainer.control, **details)
