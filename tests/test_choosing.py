"""How rounds choose: iterative or once, racing, by guesses, with or without healing; all through the same trainer."""

import json
from pathlib import Path

import pytest
import torch
from conftest import read_report, rounds_of, tiny_config, tiny_model

from hf_layerprune import (
    IterativeLayerDistillTrainer,
    LayerDistillCallback,
    LayerPlan,
    LayerPruneError,
    evaluate_model,
    prune,
    score_layers,
)
from hf_layerprune.compensation import compensate
from hf_layerprune.loading import load_model
from hf_layerprune.progress import StopOnSignal
from hf_layerprune.scoring import contiguous_stretch
from hf_layerprune.tasks import evaluate_tasks, load_tasks

FAST = {"heal": False, "measure_speed": False}


@pytest.fixture
def make(tmp_path, tokenizer, texts):
    def build(folder="run", **changes):
        return IterativeLayerDistillTrainer(
            model=tiny_model(6), args=tiny_config(tmp_path / folder, **FAST | {"target_num_layers": 3} | changes),
            train_dataset=texts, eval_dataset=texts, processing_class=tokenizer,
        )  # fmt: skip

    return build


def removed(trainer):
    return [layer for record in rounds_of(trainer) for layer in record["removed_layers"]]


@pytest.mark.parametrize("criterion", ["kl", "loss", "block_influence", "taylor"])
def test_every_round_scores_what_is_left(make, criterion):
    trainer = make(criterion=criterion)
    trainer.train()
    student, expected = tiny_model(6), []
    for _ in range(3):
        scores = score_layers(student, trainer.calibration_batches, criterion, tiny_model(6))
        expected.append(scores.safest)
        student = prune(student, [scores.safest])
    assert removed(trainer) == expected


def test_scored_once(make):
    trainer = make(one_shot=True)
    trainer.train()
    scores = score_layers(tiny_model(6), trainer.calibration_batches)
    assert removed(trainer) == list(scores.ranking[:3])
    assert [len(record["scores"]) for record in rounds_of(trainer)] == [6, 0, 0]


def test_a_stretch_of_layers_goes_in_one_round_or_from_its_top(make):
    trainer = make(criterion="angular_distance", layers_per_round=3)
    trainer.train()
    stretch = contiguous_stretch(tiny_model(6), trainer.calibration_batches, 3)
    assert removed(trainer) == list(reversed(stretch)) and len(rounds_of(trainer)) == 1
    rounds = make("rounds", criterion="angular_distance", one_shot=True)
    rounds.train()
    assert removed(rounds) == list(reversed(stretch)) and len(rounds_of(rounds)) == 3


def test_the_stretch_is_that_with_the_least_angle(make):
    trainer = make()
    model, batches = tiny_model(6), trainer.calibration_batches
    assert contiguous_stretch(model, batches, 1)[0] == score_layers(model, batches, "angular_distance").safest
    assert contiguous_stretch(model, batches, 2, layers=[0, 1, 3]) == (0, 1)
    with pytest.raises(LayerPruneError, match="no stretch of 3"):
        contiguous_stretch(model, batches, 3, layers=[0, 1, 3])


def test_random_draws_follow_the_seed(make):
    runs = [make(str(n), criterion="random", seed=seed) for n, seed in enumerate((1, 1, 3))]
    for trainer in runs:
        trainer.train()
    orders = [removed(trainer) for trainer in runs]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) > 1


def test_the_tail_goes_from_the_end_and_spares_what_is_protected(make):
    trainer = make(criterion="tail", protect_last_layers=1)
    trainer.train()
    assert removed(trainer) == [4, 3, 2]


def test_without_healing_the_students_are_the_teacher_without_layers(make, tmp_path):
    trainer = make()
    trainer.train()
    report = read_report(tmp_path / "run")
    for number, record in enumerate(report["rounds"], 1):
        assert "loss_unhealed" not in record
        student = load_model(str(tmp_path / "run" / "rounds" / f"{number:02d}"))
        plan = LayerPlan.from_dict(record["plan"])
        expected = prune(tiny_model(6), plan.removed_layers)
        assert all((a == b).all() for a, b in zip(student.parameters(), expected.parameters(), strict=True))
        assert record["loss"] == pytest.approx(evaluate_model(expected, trainer.eval_batches).loss)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "without training" in text and "± " in text and "* Round 1: " in text


def test_races_choose_the_same(make):
    data = {"num_calibration_samples": 16, "max_length": 16}
    calm, racing = make(**data), make("race", race_confidence=0.9, **data)
    calm.train()
    racing.train()
    assert removed(racing) == removed(calm)
    assert any(record["all_scores"][0]["dropped"] for record in rounds_of(racing))
    assert "(dropped at " in (Path(racing.args.output_dir) / "report.md").read_text()


def test_a_run_of_one_scoring_goes_on_in_the_same_order(make, tmp_path):
    first = make(one_shot=True, target_num_layers=4)
    first.train()
    second = make(one_shot=True)
    second.train(resume_from_checkpoint=True)
    assert removed(second) == list(score_layers(tiny_model(6), first.calibration_batches).ranking[:3])
    with pytest.raises(LayerPruneError, match="one_shot=True"):
        make(target_num_layers=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"criterion": "taylor", "edits": "parallelize"}, "edits='parallelize' needs a criterion that is measured"),
        ({"one_shot": True, "edits": "remove,parallelize"}, "leave out one_shot"),
        ({"race_confidence": 0.9, "criterion": "tail"}, "needs a criterion that is measured"),
        ({"race_confidence": 0.9, "one_shot": True}, "leave out one_shot"),
        ({"race_confidence": 2.0}, "confidence=2"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        tiny_config(tmp_path, **settings)


def test_scores_after_repair_are_those_of_repaired_students(make):
    method = "least_squares"
    batches = make().calibration_batches
    teacher = tiny_model(6)
    student = prune(teacher, [2])
    scores = score_layers(student, batches, teacher=teacher, compensation=method)
    plain = score_layers(student, batches, teacher=teacher)
    rows = [
        {key: value[n : n + 1] for key, value in batch.items()}
        for batch in batches
        for n in range(len(batch["input_ids"]))
    ]
    for layer in student.config.layer_plan["blocks"]:
        total = tokens = 0
        for fitted, measured in ((rows[1::2], rows[::2]), (rows[::2], rows[1::2])):
            after = compensate(prune(student, layer), fitted, method, teacher, gaps=layer)
            report = evaluate_model(after, measured, teacher)
            total, tokens = total + report.kl * report.num_tokens, tokens + report.num_tokens
        assert scores.values[layer[0]] == pytest.approx(total / tokens, rel=1e-3)
    assert scores.values != plain.values and scores.num_tokens == tokens
    with pytest.raises(LayerPruneError, match="need two rows of calibration data"):
        score_layers(student, rows[:1], teacher=teacher, compensation=method)


def test_rounds_repair_what_they_removed(make, tmp_path):
    method = "least_squares"
    trainer = make(compensation=method, target_num_layers=4)
    trainer.train()
    teacher, student = tiny_model(6), tiny_model(6)
    for number, layer in enumerate(removed(trainer), 1):
        scores = score_layers(student, trainer.calibration_batches, teacher=teacher, compensation=method)
        assert scores.safest == layer
        student = compensate(prune(student, [layer]), trainer.calibration_batches, method, teacher, [layer])
        saved = load_model(str(tmp_path / "run" / "rounds" / f"{number:02d}"))
        for a, b in zip(saved.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all((a == b).all() for a, b in zip(trainer.teacher.parameters(), teacher.parameters(), strict=True))


def test_a_repair_reads_rows_of_its_own(make, tmp_path):
    few = make("few", compensation="least_squares", target_num_layers=5, num_repair_samples=2)
    many = make("many", compensation="least_squares", target_num_layers=5, num_repair_samples=12)
    for trainer, rows in ((few, 2), (many, 12)):
        trainer.train()
        expected = score_layers(tiny_model(6), trainer.calibration_batches, compensation="least_squares")
        assert removed(trainer) == [expected.safest]  # scored on the rows for scoring
        assert sum(len(batch["input_ids"]) for batch in trainer.repair_batches) == rows
        student = prune(tiny_model(6), removed(trainer))
        student = compensate(student, trainer.repair_batches, "least_squares", tiny_model(6))
        saved = load_model(f"{trainer.args.output_dir}/rounds/01")
        for a, b in zip(saved.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerPruneError, match="repair_text"):
        make("many", compensation="least_squares", num_repair_samples=2).train(resume_from_checkpoint=True)


def test_every_choice_is_scored_on_the_repaired_student(make):
    trainer = make(compensation="least_squares", layers_per_round=2, target_num_layers=4)
    trainer.train()
    (record,) = rounds_of(trainer)
    teacher, student = tiny_model(6), tiny_model(6)
    for scores, layer in zip(record["all_scores"], record["removed_layers"], strict=True):
        expected = score_layers(student, trainer.calibration_batches, teacher=teacher, compensation="least_squares")
        assert scores["values"] == pytest.approx({str(k): v for k, v in expected.values.items()}, rel=1e-4)
        student = compensate(prune(student, [layer]), trainer.calibration_batches, "least_squares", teacher, [layer])
    assert record["loss"] == pytest.approx(evaluate_model(student, trainer.eval_batches).loss, rel=1e-4)


def test_repair_then_heal(make):
    settings = {"target_num_layers": 5, "num_calibration_samples": 8, "learning_rate": 3e-4, "max_steps": 6}
    trainer = make(compensation="least_squares", heal=True, **settings)
    trainer.train()
    (record,) = rounds_of(trainer)
    assert record["kl_before_healing"] < record["kl_unhealed"]  # neither repaired nor healed


@pytest.fixture
def tasks_file(tmp_path):
    rows = [{"q": f"say {word}", "good": word, "bad": word[::-1]} for word in ("one", "two", "four", "seven", "ten")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(
        "- {kind: multiple_choice, name: pairs, dataset: rows.jsonl, prompt: '', choices: [good, bad], answer: good}\n"
        "- {kind: perplexity, name: text, dataset: rows.jsonl, text: '{q}', max_length: 16, weight: 2}\n"
    )
    return str(tmp_path / "tasks.yaml")


def test_a_stretch_chosen_once_cannot_go_deeper(make):
    make("once", criterion="angular_distance", one_shot=True, target_num_layers=4).train()
    with pytest.raises(LayerPruneError, match="a stretch of 2 layers, which are gone"):
        make("once", criterion="angular_distance", one_shot=True).train(resume_from_checkpoint=True)


def test_a_stretch_is_no_longer_than_what_is_left(make):
    budget = {"target_num_layers": None, "target_num_parameters": tiny_model(1).num_parameters() + 100}
    trainer = make(criterion="angular_distance", layers_per_round=4, protect_last_layers=1, **budget)
    trainer.train()
    assert sorted(removed(trainer)) == [0, 1, 2, 3, 4]
    assert all(not record.scores[0].certainty for record in trainer.run.rounds)


def test_tasks_must_stay_the_same_within_a_run(make, tasks_file):
    make(tasks=tasks_file, target_num_layers=5).train()
    rows = Path(tasks_file).with_name("rows.jsonl")
    rows.write_text(rows.read_text().replace("seven", "eight"))
    with pytest.raises(LayerPruneError, match="tasks_text"):
        make(tasks=tasks_file, target_num_layers=4).train(resume_from_checkpoint=True)


def test_settings_as_yaml_reads_them(tmp_path, tasks_file):
    assert tiny_config(tmp_path, trained_layers=3).trained_layers == (3,)
    assert tiny_config(tmp_path, trained_layers=[3, 4]).trained_layers == (3, 4)
    assert tiny_config(tmp_path, tasks=["default", tasks_file]).tasks == f"default,{tasks_file}"
    with pytest.raises(LayerPruneError, match="layers_per_round=1.5 must be a whole number"):
        tiny_config(tmp_path, layers_per_round=1.5)


def test_unhealed_students_are_measured_as_they_are_saved(tmp_path, tokenizer, texts):
    folder = tmp_path / "half"
    tiny_model(6).bfloat16().save_pretrained(folder)
    settings = FAST | {"edits": "parallelize", "target_num_layers": 4, "num_eval_samples": 8}
    trainer = IterativeLayerDistillTrainer(
        model=str(folder), args=tiny_config(tmp_path / "run", **settings), train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    saved = load_model(str(tmp_path / "run" / "model"), dtype=torch.float32)
    assert rounds_of(trainer)[-1]["loss"] == pytest.approx(evaluate_model(saved, trainer.eval_batches).loss, rel=1e-6)


def test_rounds_score_by_tasks(make, tasks_file, tokenizer):
    trainer = make(tasks=tasks_file, target_num_layers=4)
    assert trainer.args.criterion == "tasks"
    trainer.train()
    student = tiny_model(6)
    for record in rounds_of(trainer):
        options = {"tasks": load_tasks(tasks_file), "tokenizer": tokenizer}
        scores = score_layers(student, None, "tasks", tiny_model(6), **options)
        assert record["removed_layers"] == [scores.safest] and record["criterion"] == "tasks"
        assert record["scores"] == pytest.approx({str(k): v for k, v in scores.values.items()}, rel=1e-4)
        student = prune(student, [scores.safest])
        found = evaluate_tasks(student, load_tasks(tasks_file), tokenizer)
        costs = {name: result["cost"] for name, result in record["tasks"]["results"].items()}
        assert costs == pytest.approx({name: result.cost for name, result in found.results.items()}, rel=1e-4)
        assert set(costs) == {"pairs", "text"}
    assert trainer.run.teacher.tasks.results["text"].measure == "perplexity"
    report = (Path(trainer.args.output_dir) / "report.md").read_text()
    assert f"| 4 | {found.mean_cost:.4f} | " in report and "pairs (accuracy) | text (perplexity)" in report


def test_an_evaluation_on_tasks_shows_its_steps_and_stops_when_asked(make, tasks_file):
    trainer, stop, steps = make(tasks=tasks_file, target_num_layers=5), StopOnSignal(), []

    class Watch(LayerDistillCallback):
        def on_phase_begin(self, *_, phase, **__):
            self.phase = phase

        def on_phase_step(self, *_, **__):
            steps.append(self.phase)
            stop.requested = self.phase == "evaluating tasks" and trainer.round == 1

    trainer.add_callback(Watch())
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps.count("evaluating tasks") == sum(len(task.chunks) for task in trainer.tasks) + 1  # of the teacher
    assert not trainer.run.rounds
    again = make(tasks=tasks_file, target_num_layers=5)
    again.train(resume_from_checkpoint=True)
    assert again.run.rounds[0].tasks.results


def test_tasks_and_another_criterion_do_not_go_together(tmp_path, tasks_file):
    with pytest.raises(LayerPruneError, match="are for criterion='tasks'"):
        tiny_config(tmp_path, tasks=tasks_file, criterion="loss")
    with pytest.raises(LayerPruneError, match="nothing.yaml"):
        load_tasks("nothing.yaml")
