"""How rounds choose: iterative or once, racing, by guesses, with or without healing; all through the same trainer."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model

from hf_layerprune import IterativeLayerDistillTrainer, LayerPlan, LayerPruneError, evaluate_model, prune, score_layers
from hf_layerprune.compensation import compensate
from hf_layerprune.loading import load_model
from hf_layerprune.scoring import CRITERIA, contiguous_block
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
    return [layer for record in trainer.run.rounds for layer in record["removed_layers"]]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "tasks"])
def test_every_criterion_drives_a_run(make, criterion):
    trainer = make(criterion=criterion)
    trainer.train()
    student, expected, layers = tiny_model(6), [], list(range(6))
    if criterion not in ("random", "angular_distance"):  # score again after every removal
        for _ in range(3):
            scores = score_layers(student, trainer.calibration_batches, criterion, tiny_model(6))
            expected.append(scores.safest)
            student = prune(student, [scores.safest])
        assert removed(trainer) == expected
    assert len(set(removed(trainer))) == 3 and set(removed(trainer)) <= set(layers)


def test_scored_once(make):
    trainer = make(one_shot=True)
    trainer.train()
    scores = score_layers(tiny_model(6), trainer.calibration_batches)
    assert removed(trainer) == list(scores.ranking[:3])
    assert [len(record["scores"]) for record in trainer.run.rounds] == [6, 0, 0]


def test_a_stretch_of_layers_goes_in_one_round_or_from_its_top(make):
    trainer = make(criterion="angular_distance", layers_per_round=3)
    trainer.train()
    stretch = contiguous_block(tiny_model(6), trainer.calibration_batches, 3)
    assert removed(trainer) == list(reversed(stretch)) and len(trainer.run.rounds) == 1
    rounds = make("rounds", criterion="angular_distance", one_shot=True)
    rounds.train()
    assert removed(rounds) == list(reversed(stretch)) and len(rounds.run.rounds) == 3


def test_the_stretch_is_that_with_the_least_angle(make):
    trainer = make()
    model, batches = tiny_model(6), trainer.calibration_batches
    assert contiguous_block(model, batches, 1)[0] == score_layers(model, batches, "angular_distance").safest
    assert contiguous_block(model, batches, 2, layers=[0, 1, 3]) == (0, 1)
    with pytest.raises(LayerPruneError, match="no stretch of 3"):
        contiguous_block(model, batches, 3, layers=[0, 1, 3])


def test_random_draws_follow_the_seed(make):
    runs = [make(str(n), criterion="random", seed=seed) for n, seed in enumerate((1, 1, 2, 3))]
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
    report = json.loads((tmp_path / "run" / "report.json").read_text())
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
    calm, racing = make(), make("race", race_confidence=0.9, num_calibration_samples=16)
    calm.train()
    racing.train()
    assert len(set(removed(racing))) == 3
    assert all(record["all_scores"][0]["certainty"] for record in racing.run.rounds)


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
        ({"criterion": "taylor", "edits": "parallelize"}, "nothing about running layers in parallel"),
        ({"one_shot": True, "edits": "remove,parallelize"}, "one_shot=True removes"),
        ({"race_confidence": 0.9, "criterion": "tail"}, "needs a criterion that is measured"),
        ({"race_confidence": 0.9, "one_shot": True}, "leave out one_shot"),
        ({"race_confidence": 2.0}, "confidence=2"),
        ({"one_shot": True, "criterion": "angular_distance", "target_num_layers": None, "target_latency": 0.5},
         "needs target_num_layers"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        tiny_config(tmp_path, **settings)


@pytest.mark.parametrize("method", ["rescale", "least_squares"])
def test_scores_after_repair_are_those_of_repaired_students(make, method):
    batches = make().calibration_batches
    teacher = tiny_model(6)
    student = prune(teacher, [2])
    scores = score_layers(student, batches, teacher=teacher, compensation=method)
    plain = score_layers(student, batches, teacher=teacher)
    for layer in student.config.layer_plan["blocks"]:
        after = compensate(prune(student, layer), batches, method, teacher, gaps=layer)
        assert scores.values[layer[0]] == pytest.approx(evaluate_model(after, batches, teacher).kl, rel=1e-3)
    assert scores.values != plain.values


@pytest.mark.parametrize("method", ["rescale", "least_squares"])
def test_rounds_repair_what_they_removed(make, tmp_path, method):
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


def test_repair_then_heal(make):
    settings = {"target_num_layers": 5, "num_calibration_samples": 8, "learning_rate": 3e-4, "max_steps": 6}
    trainer = make(compensation="least_squares", heal=True, **settings)
    trainer.train()
    (record,) = trainer.run.rounds
    assert record["kl_before_healing"] < record["kl_unhealed"]  # neither repaired nor healed
    with pytest.raises(LayerPruneError, match="hidden_weight=0"):
        make("other", compensation="rescale", heal=True)


@pytest.fixture
def tasks_file(tmp_path):
    rows = [{"q": f"say {word}", "good": word, "bad": word[::-1]} for word in ("one", "two", "four", "seven", "ten")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks.yaml").write_text(
        "- {kind: minimal_pairs, name: pairs, dataset: rows.jsonl, good: good, bad: bad}\n"
        "- {kind: perplexity, name: text, dataset: rows.jsonl, text: q, max_length: 16, weight: 2}\n"
    )
    return str(tmp_path / "tasks.yaml")


def test_rounds_score_by_tasks(make, tasks_file, tokenizer):
    trainer = make(tasks=tasks_file, target_num_layers=4)
    assert trainer.args.criterion == "tasks"
    trainer.train()
    student = tiny_model(6)
    for record in trainer.run.rounds:
        options = {"tasks": load_tasks(tasks_file), "tokenizer": tokenizer}
        scores = score_layers(student, None, "tasks", tiny_model(6), **options)
        assert record["removed_layers"] == [scores.safest] and record["criterion"] == "tasks"
        assert record["scores"] == pytest.approx({str(k): v for k, v in scores.values.items()}, rel=1e-4)
        student = prune(student, [scores.safest])
        found = evaluate_tasks(student, load_tasks(tasks_file), tokenizer)
        assert record["tasks"]["mean_cost"] == pytest.approx(found.mean_cost, rel=1e-4)
        assert set(record["tasks"]["results"]) == {"pairs", "text"}
    assert trainer.run.teacher["tasks"]["results"]["text"]["measure"] == "perplexity"
    report = (Path(trainer.args.output_dir) / "report.md").read_text()
    assert f"| 4 | {found.mean_cost:.4f} | " in report and "pairs (accuracy) | text (perplexity)" in report


def test_tasks_and_another_criterion_do_not_go_together(tmp_path, tasks_file):
    with pytest.raises(LayerPruneError, match="are for criterion='tasks'"):
        tiny_config(tmp_path, tasks=tasks_file, criterion="loss")
    assert tiny_config(tmp_path, criterion="tasks").tasks == "default"
    with pytest.raises(LayerPruneError, match="nothing.yaml"):
        load_tasks("nothing.yaml")
