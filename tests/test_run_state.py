import json
import shutil

import pytest
from conftest import tiny_config, tiny_model

from hf_layerprune import LayerPlan, LayerPruneError, budget
from hf_layerprune.budget import Budget, Gauge, ModelSizes
from hf_layerprune.edits import EditSpace
from hf_layerprune.files import replace_folder, to_json, write_atomically
from hf_layerprune.latency import BlockLatency
from hf_layerprune.trainer.run_state import (
    CHECKPOINT_FILES,
    RunState,
    check_target,
    gauge_of_run,
    last_whole_checkpoint,
    open_run,
)


def checkpoint(folder, step, max_steps=10, without=()):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in (*CHECKPOINT_FILES, "model.safetensors"):
        if name not in without:
            (path / name).write_text(json.dumps({"global_step": step, "max_steps": max_steps}))
    return path


def test_the_newest_whole_checkpoint_with_steps_left(tmp_path):
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    whole = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6, without=("trainer_state.json",))
    checkpoint(tmp_path, 7, without=("model.safetensors",))
    checkpoint(tmp_path, 8, without=("optimizer.pt",))
    checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-of-mine").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(whole)
    newer = checkpoint(tmp_path, 9)
    assert last_whole_checkpoint(tmp_path) == str(newer)


def test_state_round_trip(tmp_path):
    state = RunState({"seed": 1}, {"loss": 2.0}, [{"num_layers": 3}], {"removed_layers": [1]})
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state
    assert RunState.load(tmp_path / "nowhere") is None


def test_open_run(tmp_path):
    assert open_run(tmp_path, None, {"seed": 1}, None) == RunState({"seed": 1})
    found = RunState({"seed": 1, "learning_rate": 1.0}, rounds=[{"num_layers": 3}])
    same = {"seed": 1, "learning_rate": 1.0}
    assert open_run(tmp_path, found, same, str(tmp_path)) is found
    changed = {"seed": 1, "learning_rate": 0.5}
    for arguments in ((None, {}, True), (found, same, None), (found, {**same, "seed": 2}, True),
                      (found, same, "elsewhere")):  # fmt: skip
        with pytest.raises(LayerPruneError):
            open_run(tmp_path, *arguments)

    checkpoint(tmp_path / "rounds" / "02", 4)
    with pytest.raises(LayerPruneError, match="learning_rate"):
        open_run(tmp_path, found, changed, True)
    shutil.rmtree(tmp_path / "rounds")
    assert open_run(tmp_path, found, changed, True).settings == changed


def gauge(**target):
    return Gauge(
        Budget(**target), EditSpace(), ModelSizes(0, 10, 1), LayerPlan.identity(8), BlockLatency(0.0, (1.0, 1.5))
    )


def test_check_target():
    start = LayerPlan.identity(8)
    plans = [start.remove(3), start.remove(3).parallelize(4, 5)]
    run = RunState({}, rounds=[{"plan": plan.to_dict()} for plan in plans], current={"wanted": 2})
    check_target(run, start, gauge(depth=4))
    with pytest.raises(LayerPruneError, match="target_num_layers=5 but the run is at 4 already"):
        check_target(run, start, gauge(depth=5))
    run.current = {}
    check_target(run, start, gauge(latency=0.85))  # the last round went a little further: 6.5 of 8
    with pytest.raises(LayerPruneError, match="target_latency=0.9 but the run is at 0.8125 already"):
        check_target(run, start, gauge(latency=0.9))


def test_latencies_are_measured_once_a_run(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(budget, "measure_latency", lambda *_: measured.append(1) or BlockLatency(0.5, (1.0, 1.25)))
    args = tiny_config(tmp_path, target_num_layers=None, target_latency=0.5, edits="remove,parallelize")
    run = RunState({})
    first = gauge_of_run(run, args, tiny_model())
    run.save(tmp_path)
    again = gauge_of_run(RunState.load(tmp_path), args, tiny_model())
    assert measured == [1] and again.latency == first.latency == BlockLatency(0.5, (1.0, 1.25))
    assert again.size(LayerPlan.identity(5)) == 1
    assert again.size(LayerPlan.identity(5).parallelize(2, 3)) == pytest.approx((0.5 + 3 + 1.25) / 5.5)


def test_json_is_json():
    assert json.loads(to_json({"a": [float("nan"), 1.5], "b": float("inf")})) == {"a": [None, 1.5], "b": None}


def test_files_and_folders_are_replaced_whole(tmp_path):
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_text() == "two"
    for name, text in (("old", "1"), ("new", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "old"]
