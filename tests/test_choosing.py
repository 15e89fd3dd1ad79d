"""How rounds choose: iterative or once, racing, by guesses, with or without healing; all through the same trainer."""

import json

import pytest
from conftest import tiny_config, tiny_model

from hf_layerprune import IterativeLayerDistillTrainer, LayerPlan, LayerPruneError, evaluate_model, prune, score_layers
from hf_layerprune.loading import load_model
from hf_layerprune.scoring import CRITERIA, contiguous_block

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


@pytest.mark.parametrize("criterion", CRITERIA)
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
