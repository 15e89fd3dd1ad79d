"""The rounds of iterative layer-wise distillation: choose, edit, heal, evaluate, until the plan meets the target."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput, set_seed

from .._trl import set_model
from ..compensation import compensate
from ..errors import LayerPruneError, NotANumber
from ..evaluation import EvaluationReport, evaluate_model
from ..files import digests, replace_folder, round_folder, write_atomically
from ..hub.paths import without_local_paths
from ..loading import load_model
from ..plan import Edit
from ..record import PLAN_FILE, Healing, RoundInProgress, RoundRecord, RunRecord, TeacherRecord
from ..scoring import MEASURED, Race
from ..search import SearchStep, next_edit
from ..surgery import apply_plan, plan_of, share_equal_weights
from ..tasks import TaskReport, evaluate_tasks
from .callbacks import fire
from .checkpoints import last_checkpoint, what_is_left
from .engines import agreed, autocast, on_main
from .healing import HealingTrainer
from .speed import speed_runs, with_speed
from .students import check_student, publish_student, put_in_place, unpruned, write_student
from .targets import trained_blocks
from .trainable import round_weights

if TYPE_CHECKING:
    from .iterative import IterativeLayerDistillTrainer

NOTHING_TRAINED = TrainOutput(0, 0.0, {})


class Rounds:
    """The rounds of one call of `train()`; what is known of them lies in `trainer.file`, the run on disk."""

    def __init__(self, trainer: IterativeLayerDistillTrainer) -> None:
        self.trainer, self.args, self.file = trainer, trainer.args, trainer.file
        self.teacher, self.goal = trainer.teacher, trainer.goal

    @property
    def run(self) -> RunRecord:
        return self.file.record

    def train(self) -> TrainOutput:
        """The loop. A run that resumes finds in its record what it need not do again."""
        student, output = self._first_student(), NOTHING_TRAINED
        set_model(self.trainer, student)
        if self.run.teacher is None:
            self._measure_teacher()
        only_heals = not self.run.rounds and self.goal.met(plan_of(student))  # a student as deep as it shall be
        while only_heals or not self.goal.met(plan_of(student)):
            only_heals, self.trainer.round = False, len(self.run.rounds) + 1
            self._event("on_round_begin", number=self.trainer.round, depth=plan_of(student).depth)
            student = self._choose_and_edit(student)
            if self.args.heal:
                self._measure_unhealed(student)
            student, output = self._heal(student)
            self._finish_round(student)
        self._measure_speed()
        self.file.save("all", self.trainer.round)
        self._phase("writing")
        self._publish()
        return output

    def _first_student(self) -> PreTrainedModel:
        if self.run.rounds:
            last = self.run.rounds[-1]
            return self._load_student(last.number, last.files)
        student = unpruned(self.trainer.start)
        share_equal_weights(student, self.teacher)
        return student

    def _load_student(self, number: int, files: dict[str, str]) -> PreTrainedModel:
        folder = round_folder(self.file.folder, number)
        check_student(folder, files)
        student = load_model(str(folder), dtype=self.trainer.start.dtype).to(self.args.device)
        share_equal_weights(student, self.teacher)
        return student

    def _measure_teacher(self) -> None:
        self._phase("evaluating teacher")
        record = TeacherRecord.of(
            self.teacher,
            evaluate_model(self.teacher, self.trainer.eval_batches, on_batch=self._phase_step),
            tasks=self._measure_tasks(self.teacher),
            name=without_local_paths(self.trainer.teacher_name),
            evaluated_on="calibration data" if self.trainer.eval_dataset is None else "evaluation data",
        )
        self.file.save("evaluating teacher", teacher=record)

    def _choose_and_edit(self, student: PreTrainedModel) -> PreTrainedModel:
        """Make this round's edits, one at a time, each scored on what is left."""
        wanted = self.args.layers_per_round
        if self.goal.budget.unit == "depth":
            wanted = min(wanted, plan_of(student).depth - self.goal.budget.target)
        if self.run.current is None:
            self.file.record = replace(self.run, current=RoundInProgress(wanted))
        for edit in self.run.current.edits:  # of a run that resumes
            student = self._edited(student, edit)
        while len(self.run.current.edits) < self.run.current.wanted and not self.goal.met(plan_of(student)):
            self._phase("scoring", num_layers=plan_of(student).depth)
            start = time.perf_counter()
            with autocast(self.trainer.accelerator):  # all candidates are rounded alike, in half of the time
                step = agreed(self._next_edit(student))
            seconds = time.perf_counter() - start
            student = self._edited(student, step.edit)
            current, one_shot = self.run.current, self.args.one_shot
            self.file.record = replace(self.run, order=step.order if one_shot else ())
            self._change_round(
                "scoring",
                edits=(*current.edits, step.edit),
                scores=current.scores if step.scores is None else (*current.scores, step.scores),
                order=() if one_shot else step.order,
                seconds_scoring=current.seconds_scoring + seconds,
            )
        return student

    def _next_edit(self, student: PreTrainedModel) -> SearchStep:
        args, depth, num_removals = self.args, plan_of(student).depth, None
        if args.one_shot:
            num_removals = depth - int(self.goal.budget.target)
        elif args.criterion == "angular_distance":
            num_removals = self.run.current.wanted
        options: dict[str, Any] = {"seed": args.seed + depth}  # another draw of "random" in every round
        if args.criterion in MEASURED:  # the layer that will be repaired is the one to judge
            options |= {"compensation": args.compensation, "tasks": self.trainer.tasks}
            options |= {"tokenizer": self.trainer.processing_class}
        return next_edit(
            student,
            self.trainer.calibration_batches,
            self.goal,
            args.criterion,
            self.teacher,
            race=None if args.race_confidence is None else Race(args.race_confidence, args.seed),
            order=self.run.order if args.one_shot else self.run.current.order,
            num_removals=num_removals,
            on_batch=self._phase_step,
            **options,
        )

    def _edited(self, student: PreTrainedModel, edit: Edit) -> PreTrainedModel:
        """`student` after an edit, the gap repaired in closed form, in weights that the saved dtype can hold."""
        student = apply_plan(student, edit.apply(plan_of(student)), share_weights=True)
        if self.args.compensation != "none" and edit.kind == "remove":
            self._phase("repairing", num_layers=plan_of(student).depth)
            with autocast(self.trainer.accelerator):
                repair = (self.trainer.repair_batches, self.args.compensation, self.teacher, edit.layers)
                student = compensate(student, *repair, on_batch=self._phase_step, share_weights=True)
        round_weights(student, self.trainer.save_dtype)
        return student

    def _measure_unhealed(self, student: PreTrainedModel) -> None:
        """Measure the student before its healing, and the teacher after the same edits without any training."""
        if self.run.current.phase != "choosing":
            return
        before = unhealed = self._measure(student)
        if self.run.rounds or self.trainer.start is not self.teacher or self.args.compensation != "none":
            unhealed = self._measure(apply_plan(self.teacher, plan_of(student), share_weights=True))
        self._change_round("evaluating unhealed", phase="edited", before_healing=before, unhealed=unhealed)

    def _heal(self, student: PreTrainedModel) -> tuple[PreTrainedModel, TrainOutput]:
        """Train the student of this round; a checkpoint of an interrupted healing is taken up."""
        number, current, accelerator = self.trainer.round, self.run.current, self.trainer.accelerator
        folder = round_folder(self.file.folder, number)
        if current.phase == "healed":  # the run was interrupted after its healing: the student is on disk
            on_main(accelerator, lambda: put_in_place(folder, current.files))
            student = self._load_student(number, current.files)
            set_model(self.trainer, student)
            return student, NOTHING_TRAINED
        if not self.args.heal:
            self._keep(student)
            return student, NOTHING_TRAINED
        trained = self.args.named_trained_layers() or self.args.trained_layers
        blocks = trained_blocks(plan_of(student), current.edits, trained)
        set_seed(self.args.seed + number)  # adapters are drawn at random: the same ones after a resume
        rows = self.trainer.all_train_rows.shuffle(seed=self.args.seed + number)  # other rows every round
        self._phase("healing", num_layers=plan_of(student).depth)
        checkpoint = on_main(accelerator, lambda: last_checkpoint(folder))
        healing = HealingTrainer(
            self.trainer, student, blocks, rows, folder, lambda step: self.file.save("checkpoint", number, step)
        )
        try:
            student, output = healing.heal(self.trainer.save_dtype, checkpoint)
        except NotANumber as error:
            raise NotANumber(f"{error}{on_main(accelerator, lambda: what_is_left(folder))}") from error
        self._keep(student, Healing(int(healing.state.num_input_tokens_seen), healing.seconds))
        return student, output

    def _keep(self, student: PreTrainedModel, healing: Healing | None = None) -> None:
        """Save the student of this round.

        It takes the place of its healing's checkpoints, so the run says first that it is done and of which files:
        from there on a resume finds it, wherever a kill has left it.
        """
        trainer, folder = self.trainer, round_folder(self.file.folder, self.trainer.round)
        set_model(trainer, student)
        trainer.accelerator.wait_for_everyone()
        written = None
        if self.args.should_save:
            written = write_student(student, trainer.processing_class, trainer.save_dtype, folder)
        files = {} if written is None else digests(written)
        self._change_round("healing", phase="healed", healing=healing, files=files)
        if written is not None:
            replace_folder(written, folder)
        trainer.accelerator.wait_for_everyone()

    def _finish_round(self, student: PreTrainedModel) -> None:
        after, current, number = self._measure(student), self.run.current, self.trainer.round
        if not math.isfinite(after.loss):  # this healing does not count
            self._change_round("scoring", phase="edited" if self.args.heal else "choosing")
            if self.args.should_save:
                shutil.rmtree(round_folder(self.file.folder, number))
            advice = "; lower the learning rate" if self.args.heal else ""
            raise LayerPruneError(
                f"round {number}: the student's loss is {after.loss}{advice}. The rounds before it are kept"
            )
        names = ("edits", "scores", "seconds_scoring", "unhealed", "before_healing", "healing", "files")
        record = RoundRecord.of(
            student,
            after,
            tasks=self._measure_tasks(student),
            number=number,
            criterion=self.args.criterion,
            **{name: getattr(current, name) for name in names},
        )
        self.file.record = self.run.with_round(record)
        self.file.save("round", number)
        self.file.report()
        self._event("on_round_end", record=record)

    def _measure_speed(self) -> None:
        is_wanted = self.args.measure_speed and self.args.should_save and self.run.rounds
        if is_wanted and self.run.rounds[-1].speed is None:
            self._phase("measuring speed", num_runs=speed_runs(self.run))
            self.file.record = with_speed(self.run, self.teacher, self.trainer.save_dtype, self._phase_step)

    def _publish(self) -> None:
        """Fill in what a user looks for first: the final model and its plan."""
        if self.args.should_save and self.run.rounds:
            folder, last = self.file.folder, self.run.rounds[-1]
            self.file.report()
            self.trainer.create_model_card()
            files = [folder / name for name in ("README.md", "quality.png", "layers.png")]
            publish_student(round_folder(folder, last.number), folder / "model", files)
            write_atomically(folder / PLAN_FILE, last.plan.to_json() + "\n")

    def _measure(self, student: PreTrainedModel) -> EvaluationReport:
        self._phase("evaluating", num_layers=plan_of(student).depth)
        return evaluate_model(student, self.trainer.eval_batches, self.teacher, on_batch=self._phase_step)

    def _measure_tasks(self, model: PreTrainedModel) -> TaskReport | None:
        tasks = self.trainer.tasks
        return evaluate_tasks(model, tasks, self.trainer.processing_class, self.teacher) if tasks else None

    def _change_round(self, done: str, **changes: Any) -> None:
        """Change fields of the round in progress and save the run."""
        self.file.save(done, self.trainer.round, current=replace(self.run.current, **changes))

    def _phase(self, phase: str, **details: Any) -> None:
        self.file.begin(phase)
        self._event("on_phase_begin", phase=phase, **details)

    def _phase_step(self) -> None:
        self._event("on_phase_step")

    def _event(self, name: str, **details: Any) -> None:
        trainer = self.trainer
        fire(trainer.callback_handler.callbacks, name, self.args, trainer.state, trainer.control, **details)
