import json
import shutil

import pytest
import torch
from conftest import tiny_config, tiny_model
from datasets import Dataset
from safetensors.torch import save_file

from hf_layerprune import LayerPlan, LayerPruneError, budget
from hf_layerprune.budget import BlockLatency, Budget, EditSpace, Goal, ModelSizes
from hf_layerprune.files import replace_folder, to_json, write_atomically
from hf_layerprune.trainer.checkpoints import (
    SEAL,
    Checkpoint,
    drop_ruined_checkpoints,
    last_checkpoint,
    load_trained,
    seal,
)
from hf_layerprune.trainer.run_state import RunState, check_not_past_target, decisive_settings, goal_of_run, open_run


def checkpoint(folder, step, weight=1.0):
    found = Checkpoint(str(folder / f"checkpoint-{step}"), balance=step / 7, seconds=2.0 * step)
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

    with pytest.raises(LayerPruneError, match="another version of hf_layerprune; choose another output_dir"):
        open_run(tmp_path, found, {**same, "data_seed": None}, True)

    checkpoint(tmp_path / "rounds" / "02", 4)
    with pytest.raises(LayerPruneError, match="learning_rate.*delete .*02 to heal its round from the start"):
        open_run(tmp_path, found, changed, True)
    found.current = {"train_tokens": 96}  # healed, though its student is not where the checkpoints are yet
    assert open_run(tmp_path, found, changed, True).settings == changed
    found.current = {}
    shutil.rmtree(tmp_path / "rounds")
    assert open_run(tmp_path, found, same, True).settings == same


@pytest.mark.parametrize("number", [1, 5, 64, 1000])
def test_another_text_to_heal_on_is_told_by_rows_from_all_over(tmp_path, number):
    def settings(rows):
        data = (Dataset.from_dict({"input_ids": rows}), [], [], [])
        return decisive_settings(tiny_config(tmp_path), model, model, data, None)["healing_text"]

    model, rows = tiny_model(2), [[n, n + 1] for n in range(number)]
    before = settings(rows)
    assert settings(rows) == before
    for other in (rows[:-1] + [[0, 7]], rows[:8] + [[7, *row] for row in rows[8:]] + [[1]], [[9, 9], *rows[1:]]):
        assert settings(other) != before


def goal(**target):
    return Goal(
        Budget.of(target), EditSpace(), ModelSizes(0, 10, 1), LayerPlan.identity(8), BlockLatency(0.0, (1.0, 1.5))
    )


def test_a_run_past_its_target_is_refused():
    start = LayerPlan.identity(8)
    plans = [start.remove(3), start.remove(3).parallelize(4, 5)]
    run = RunState({}, rounds=[{"plan": plan.to_dict()} for plan in plans], current={"wanted": 2})
    check_not_past_target(run, start, goal(depth=4))
    with pytest.raises(LayerPruneError, match="target_num_layers=5 but the run is at 4 already"):
        check_not_past_target(run, start, goal(depth=5))
    run.current = {}
    check_not_past_target(run, start, goal(latency=0.85))  # the last round went a little further: 6.5 of 8
    with pytest.raises(LayerPruneError, match="target_latency=0.9 but the run is at 0.8125 already"):
        check_not_past_target(run, start, goal(latency=0.9))


def test_latencies_are_measured_once_a_run(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(budget, "measure_latency", lambda *_: measured.append(1) or BlockLatency(0.5, (1.0, 1.25)))
    args = tiny_config(tmp_path, target_num_layers=None, target_latency=0.5, edits="remove,parallelize")
    run = RunState({})
    first = goal_of_run(run, args, tiny_model())
    run.save(tmp_path)
    again = goal_of_run(RunState.load(tmp_path), args, tiny_model())
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
