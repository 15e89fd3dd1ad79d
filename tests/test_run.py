import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, tiny_model
from datasets import Dataset
from safetensors.torch import save_file

from hf_layerprune import LayerPlan, LayerPruneError
from hf_layerprune.benchmark import BenchmarkReport
from hf_layerprune.budget import BlockCosts, Budget, EditSpace, Goal
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.plan import Edit
from hf_layerprune.record import (
    Done,
    Healing,
    RoundInProgress,
    RoundRecord,
    RunRecord,
    Speed,
    TeacherRecord,
    read_state,
)
from hf_layerprune.scoring import Scores
from hf_layerprune.trainer.checkpoints import (
    SEAL,
    Checkpoint,
    drop_ruined_checkpoints,
    last_checkpoint,
    load_trained,
    seal,
)
from hf_layerprune.trainer.run import check_not_past_target, check_resume, decisive_settings


def checkpoint(folder, step, weight=1.0):
    found = Checkpoint(str(folder / f"checkpoint-{step}"), seconds=2.0 * step)
    (path := folder / f"checkpoint-{step}").mkdir(parents=True)
    save_file({"a": torch.zeros(3), "b": torch.full((2,), weight)}, path / "model.safetensors")
    (path / "shards").mkdir()
    (path / "shards" / "optimizer").write_text(str(step))
    seal(found)
    return found


def test_the_newest_checkpoint_that_is_as_it_was_sealed(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nowhere") is None
    whole = checkpoint(tmp_path, 4)
    for step, damage in (
        (6, lambda path: (path / "model.safetensors").write_bytes(b"")),
        (7, lambda path: (path / "shards" / "optimizer").unlink()),
        (8, lambda path: (path / SEAL).write_text("{")),
        (10, lambda path: (path / SEAL).write_text("{}")),
        (11, lambda path: (path / SEAL).unlink()),  # cut off before it was whole
    ):
        checkpoint(tmp_path, step)
        damage(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert last_checkpoint(tmp_path) == whole
    assert [f"checkpoint-{step} is damaged" in caplog.text for step in (6, 7, 8, 10, 11)] == [True] * 4 + [False]
    (tmp_path / "checkpoint-4" / "of-mine").write_text("")
    assert last_checkpoint(tmp_path) == whole
    newer = checkpoint(tmp_path, 12)
    assert last_checkpoint(tmp_path) == newer


def test_only_checkpoints_with_a_weight_that_is_no_number_go(tmp_path):
    for step, weight in ((1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0), (5, 2.0)):
        checkpoint(tmp_path, step, weight)
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"")  # tells nothing of what was saved
    (tmp_path / "checkpoint-5" / "model.safetensors").unlink()  # FSDP saves its shards in a folder, in another form
    drop_ruined_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]


def test_only_trained_weights_are_loaded(tmp_path):
    checkpoint(tmp_path, 1, 5.0)
    model = torch.nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(2)})
    model["a"].requires_grad_(False)
    load_trained(model, tmp_path / "checkpoint-1")
    assert model["a"].tolist() == [1, 1, 1] and model["b"].tolist() == [5, 5]
    model["c"] = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(LayerPruneError, match="lacks c"):
        load_trained(model, tmp_path / "checkpoint-1")


RECORD = RoundRecord(
    LayerPlan.identity(4).remove(1),
    "Qwen2",
    1000,
    EvaluationReport(2.0, 7.4, 0.5, 0.9, 64),
    number=1,
    edits=(Edit.remove(1),),
    criterion="kl",
    scores=(Scores("kl", {Edit.remove(1): 0.5, Edit.parallelize(2, 3): math.nan}, 0.1, 64),),
    unhealed=EvaluationReport(3.0, 20.1, 1.0, None, 64),
    before_healing=EvaluationReport(2.5, 12.2, 0.8, None, 64),
    healing=Healing(4096, 1.5),
    files={"model.safetensors": "ab"},
)


def test_state_round_trip(tmp_path):
    teacher = TeacherRecord(LayerPlan.identity(4), "Qwen2", 1200, EvaluationReport(1.9, 6.7, None, None, 64), name="a")
    current = RoundInProgress(2, "edited", (Edit.remove(0),), edits=(Edit.remove(0),), unhealed=RECORD.unhealed)
    speed = Speed(BenchmarkReport(1.0, 2.0, 3, 4, 1, 0.5, 1.0, 1.0), "float32", 128, 64)
    run = RunRecord({"seed": 1}, replace(teacher, speed=speed), (RECORD,), current, latency=BlockCosts(1.0, (2.0,)))
    run = replace(run, environment={"hardware": "CPU"}, seconds={"scoring": 2.0}, done=Done("scoring", 2))
    (tmp_path / "run_state.json").write_text(run.to_json())
    assert repr(read_state(tmp_path)) == repr(run)  # NaN is not equal to itself
    assert read_state(tmp_path / "nowhere") is None
    (tmp_path / "run_state.json").write_text(run.to_json()[:-9])
    with pytest.raises(LayerPruneError, match="damaged.*move .* away"):
        read_state(tmp_path)


def test_only_the_same_run_is_resumed(tmp_path):
    same = {"seed": 1, "learning_rate": 1.0}
    changed = {"seed": 1, "learning_rate": 0.5}
    found = RunRecord(same, rounds=(RECORD,))
    check_resume(tmp_path, None, {"seed": 1}, None)
    check_resume(tmp_path, found, same, str(tmp_path))
    for arguments in ((None, {}, True), (found, same, None), (found, {**same, "seed": 2}, True),
                      (found, same, "elsewhere")):  # fmt: skip
        with pytest.raises(LayerPruneError):
            check_resume(tmp_path, *arguments)

    with pytest.raises(LayerPruneError, match="another version of hf_layerprune; choose another output_dir"):
        check_resume(tmp_path, found, {**same, "data_seed": None}, True)

    checkpoint(tmp_path / "rounds" / "02", 4)
    with pytest.raises(LayerPruneError, match="learning_rate.*delete .*02 to heal its round from the start"):
        check_resume(tmp_path, found, changed, True)
    healed = replace(found, current=RoundInProgress(1, "healed"))  # its student is not where the checkpoints are yet
    check_resume(tmp_path, healed, changed, True)
    shutil.rmtree(tmp_path / "rounds")
    check_resume(tmp_path, found, changed, True)


@pytest.mark.parametrize("number", [1, 5, 64, 1000])
def test_another_text_to_heal_on_is_told_by_rows_from_all_over(tmp_path, number):
    def settings(rows):
        data = (Dataset.from_dict({"input_ids": rows}), {}, [])
        return decisive_settings(tiny_config(tmp_path), model, model, *data, None)["healing_text"]

    model, rows = tiny_model(2), [[n, n + 1] for n in range(number)]
    before = settings(rows)
    assert settings(rows) == before
    for other in (rows[:-1] + [[0, 7]], rows[:8] + [[7, *row] for row in rows[8:]] + [[1]], [[9, 9], *rows[1:]]):
        assert settings(other) != before


def goal(**target):
    costs = BlockCosts(0.0, (1.0, 1.5)) if "latency" in target else BlockCosts(0, (1, 1))
    return Goal(Budget.of(target), EditSpace(), costs, LayerPlan.identity(8))


def test_a_run_past_its_target_is_refused():
    start = LayerPlan.identity(8)
    plans = [start.remove(3), start.remove(3).parallelize(4, 5)]
    run = RunRecord(rounds=tuple(replace(RECORD, plan=plan) for plan in plans), current=RoundInProgress(2))
    check_not_past_target(run, start, goal(depth=4))
    with pytest.raises(LayerPruneError, match="target_num_layers=5 but the run is at 4 already"):
        check_not_past_target(run, start, goal(depth=5))
    run = replace(run, current=None)
    check_not_past_target(run, start, goal(latency=0.85))  # the last round went a little further: 6.5 of 8
    with pytest.raises(LayerPruneError, match="target_latency=0.9 but the run is at 0.8125 already"):
        check_not_past_target(run, start, goal(latency=0.9))
