import json
import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import pytest
from conftest import tiny_config, tiny_model
from datasets import Dataset
from peft import LoraConfig

from hf_layerprune import LayerPlan, LayerPruneError, __version__
from hf_layerprune import environment as versions
from hf_layerprune.benchmark import BenchmarkReport
from hf_layerprune.budget import BlockCosts
from hf_layerprune.evaluation import EvaluationReport
from hf_layerprune.plan import Edit
from hf_layerprune.record import (
    Healing,
    RoundInProgress,
    RoundRecord,
    RunRecord,
    Speed,
    TeacherRecord,
    read_state,
)
from hf_layerprune.scoring import Scores
from hf_layerprune.trainer.run import check_resume, decisive_settings

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
)


def test_state_round_trip(tmp_path):
    teacher = TeacherRecord(LayerPlan.identity(4), "Qwen2", 1200, EvaluationReport(1.9, 6.7, None, None, 64), name="a")
    current = RoundInProgress(2, "edited", 3, edits=(Edit.remove(0),), unhealed=RECORD.unhealed)
    speed = Speed(BenchmarkReport(1.0, 2.0, 3, 4, 1, 0.5, 1.0, 1.0), "float32", 128, 64)
    run = RunRecord({"seed": 1}, replace(teacher, speed=speed), (RECORD,), current, latency=BlockCosts(1.0, (2.0,)))
    run = replace(run, environment={"hardware": "CPU"}, seconds={"scoring": 2.0}, order=(Edit.remove(0),))
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

    check_resume(tmp_path, found, changed, True)  # a healing that diverged is tried again


@pytest.mark.parametrize("number", [1, 64, 1000])
def test_another_text_to_heal_on_is_told_by_rows_from_all_over(tmp_path, number):
    def settings(rows):
        data = (Dataset.from_dict({"input_ids": rows}), {}, [])
        return decisive_settings(tiny_config(tmp_path), model, model, *data, None)["healing_text"]

    model, rows = tiny_model(2), [[n, n + 1] for n in range(number)]
    before = settings(rows)
    assert settings(rows) == before
    for other in (rows[:-1] + [[0, 7]], rows[:8] + [[7, *row] for row in rows[8:]] + [[1]], [[9, 9], *rows[1:]]):
        assert settings(other) != before


def test_adapters_print_alike_in_every_process(tmp_path):
    model, peft = (
        tiny_model(2),
        LoraConfig(target_modules=["q_proj", "down_proj", "up_proj"]),
    )
    data = (Dataset.from_dict({"input_ids": [[1, 2]]}), {}, [])
    settings = decisive_settings(tiny_config(tmp_path), model, model, *data, peft)
    assert json.loads(settings["peft"])["target_modules"] == ["down_proj", "q_proj", "up_proj"]


def test_the_version_is_known_where_the_package_is_not_installed(monkeypatch):
    def installed(name):
        if name == "hf-layerprune":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(versions, "version", installed)
    assert versions.environment()["hf-layerprune"] == __version__
