"""`benchmarks/gpu.py` on a CPU with shapes of nothing: every section runs, and what goes wrong is recorded."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import CLI, accelerate_launch, run

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The script as a module, and the folder of benchmarks on the path."""
    before = list(sys.path)
    sys.path[:0] = [str(BENCHMARKS)]
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def start(*words):
    """Python's command line in a forked process, for `gpu_sections.engines.start`."""
    if words[1] == "accelerate.commands.launch":
        accelerate_launch(*words[2:])
    else:
        assert (process := run(CLI, *words[2:])).wait() == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def results(gpu, tmp_path_factory):
    from gpu_sections import engines

    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "start", start)
        gpu.main(["--device", "cpu", "--tiny", "--seconds", "3000", "--output", str(folder)])
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_case_of_every_section_has_a_result(gpu, results):
    assert list(gpu.QUICK_SECONDS) == sorted(results, key=list(gpu.QUICK_SECONDS).index)
    for name, record in results.items():
        assert record["environment"]["hardware"].startswith("CPU") and record["environment"]["torch"]
        assert record["cases"] and record["section"] == name and record["tiny"]
        for case, found in record["cases"].items():
            assert "result" in found, (name, case, found)


def verdicts(found):
    """Every `ok` in nested results."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from [value] if key == "ok" else verdicts(value)


def test_results_agree_with_their_references(results):
    judged = {case: list(verdicts(found)) for case, found in results["correctness"]["cases"].items()}
    assert len(judged) >= 11 and all(judged.values())
    assert all(all(values) for values in judged.values()), judged
    assert results["engines"]["cases"]["ddp_cpu.yaml"]["result"]["ok"]


def test_decoding_is_measured_for_every_variant(results):
    for mode in ("graphs", "eager"):
        found = results["decode"]["cases"][f"Qwen3-0.6B, batch 2, {mode}"]["result"]
        assert list(found) == ["as it is", "6 layers", "8 in 6", "8 in 5", "8 in 5, groups of 4"]
        assert found["as it is"]["ratio"] == 1 and all(entry["ratio"] > 0 for entry in found.values())


def test_the_healing_step_is_measured_every_way(results):
    cases = results["healing_step"]["cases"]
    peaks = {name: found["result"]["peak_bytes"] for name, found in cases.items() if name.startswith("memory, ")}
    assert peaks["memory, ours"] < peaks["memory, ours, no shared weights"] < peaks["memory, paper"]
    times = cases["time"]["result"]
    assert len(times) == len(peaks) == 7 and times["paper"]["over_paper"] == 1
    assert times["ours"]["operations"] < times["paper"]["operations"]
    assert cases["profile of ours"]["result"]["operations"]


def test_memory_and_scoring_are_compared(results):
    memory = results["memory"]["cases"]["neighbours"]["result"]
    assert 0.5 < memory["estimated_over_measured"] < 2
    for found in results["scoring_cost"]["cases"].values():
        assert found["result"]["largest_difference"] < 1e-4


def section(gpu, tmp_path, monkeypatch, seconds, **cases):
    """The JSON that a section of these cases writes."""
    module = ModuleType("gpu_sections.fake")
    module.cases = lambda run: list(cases.items())
    monkeypatch.setitem(sys.modules, "gpu_sections.fake", module)
    gpu.run_section("fake", None, time.monotonic() + seconds, tmp_path / "fake.json", {"suite": "quick"})
    return json.loads((tmp_path / "fake.json").read_text())


def test_a_failure_is_recorded_and_the_rest_runs(gpu, tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("CUDA error: out of memory")

    def lacks():
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    found = section(gpu, tmp_path, monkeypatch, 60, fails=fails, lacks=lacks, works=lambda: {"speed": float("nan")})
    assert found["cases"]["fails"]["error"] == "RuntimeError: CUDA error: out of memory"
    assert found["cases"]["lacks"]["missing"] == "No module named 'trl'"
    assert found["cases"]["works"]["result"] == {"speed": None}


def test_a_section_ends_when_its_time_does(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr("gpu_sections.common.release", lambda: None)
    start = time.monotonic()
    cases = {"quick": dict, "endless": lambda: time.sleep(60), "late": dict}
    found = section(gpu, tmp_path, monkeypatch, 1.0, **cases)
    assert time.monotonic() - start < 20
    assert "result" in found["cases"]["quick"] and "stopped after" in found["cases"]["endless"]["error"]
    assert found["cases"]["late"] == {"skipped": "the section had no time left"}


def test_a_section_without_its_package_says_so(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "gpu_sections.memory", raising=False)
    gpu.run_section("memory", None, time.monotonic() + 60, tmp_path / "memory.json", {})
    found = json.loads((tmp_path / "memory.json").read_text())
    assert "datasets" in found["missing"] and found["cases"] == {}


def test_without_a_gpu_the_script_says_what_to_do(gpu, tmp_path):
    with pytest.raises(SystemExit, match="--device cpu --tiny"):
        gpu.main(["--output", str(tmp_path)])


def test_quick_fits_into_nine_minutes(gpu):
    assert sum(gpu.QUICK_SECONDS.values()) <= 9 * 60


# ------------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def predictions(gpu):
    import predictions

    return predictions


def test_the_page_shows_what_is_predicted(predictions):
    page = (ROOT / "docs" / "parallel.md").read_text()
    committed = BENCHMARKS / "results" / "gpu" / "decode.json"
    assert predictions.table(json.loads(committed.read_text()) if committed.exists() else None) in page


def test_kernels_are_counted_by_block(predictions):
    outside, of_width = predictions.counted_kernels("Qwen2.5-3B")
    assert 10 < outside < 40 and 30 < of_width[1] < 60
    assert of_width[1] == of_width[2] == of_width[4], "a wide block launches as many kernels as a narrow one"


def test_a_prediction_follows_its_assumptions(predictions):
    config = predictions.load_shape("Qwen3-8B")
    names = list(predictions.variants(config))
    heavy = predictions.Card(bandwidth=1e9, gap=0.0, launch=0.0)  # only bytes count
    light = predictions.Card(bandwidth=1e18, gap=1e-6, launch=1e-5)  # only kernels do
    removed, pairs = names[1], names[2]
    assert predictions.predicted_ratio("Qwen3-8B", pairs, 1, "graphs", heavy) == pytest.approx(1)
    assert predictions.predicted_ratio("Qwen3-8B", removed, 1, "graphs", heavy) == pytest.approx(36 / 27, rel=0.05)
    assert predictions.predicted_ratio("Qwen3-8B", pairs, 1, "eager", light) == pytest.approx(36 / 29, rel=0.05)


def test_a_measurement_takes_its_cell(predictions):
    case = {"result": {"28 in 18": {"ratio": 1.257}}}
    shown = predictions.table({"cases": {"Qwen3-0.6B, batch 1, graphs": case}})
    (row,) = re.findall(r"^\| Qwen3-0\.6B \| 1 \| 28 in 18 \|.*$", shown, re.MULTILINE)
    assert "x / 1.26x" in row and row.count("?") == 2
    assert "28 in 18, graphs: 1.26x, goal 1.25x" in predictions.goals({"cases": {"Qwen3-0.6B, batch 1, graphs": case}})


def test_a_stepper_does_not_run_past_its_cache(gpu):
    from gpu_sections.common import small_model
    from gpu_sections.stepper import Stepper

    stepper = Stepper(small_model("qwen2", 2, torch.device("cpu")), torch.zeros(1, 3, dtype=torch.long), 1)
    stepper.step()
    with pytest.raises(ValueError, match="step 2 of a cache for 1"):
        stepper.step()
