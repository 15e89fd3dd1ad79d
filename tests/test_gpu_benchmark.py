"""`benchmarks/gpu.py` on a CPU with shapes of nothing: every section runs, and what goes wrong is recorded."""

import copy
import importlib.util
import json
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import CLI, accelerate_launch, run
from test_commands import narrow_teacher

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


def start(teacher, *words):
    """Python's command line in a forked process with a narrow `teacher`, for `gpu_sections.engines.start`."""
    words = [teacher if word == "embedded" else word for word in words]
    if words[1] == "accelerate.commands.launch":
        accelerate_launch(*words[2:])
    else:
        assert (process := run(CLI, *words[2:])).wait() == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def results(gpu, tmp_path_factory):
    from gpu_sections import engines

    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "start", partial(start, narrow_teacher(folder / "teacher")))
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
    assert len(judged) >= 14 and all(judged.values())
    assert all(all(values) for values in judged.values()), judged
    for case in ("merged blocks, qwen2", "merged blocks, qwen3", "parallel blocks, qwen3, sdpa"):
        assert set(results["correctness"]["cases"][case]["result"]) == {"float32", "bfloat16"}
    assert all(results["engines"]["cases"][name]["result"]["ok"] for name in ("ddp_cpu.yaml", "fsdp2.yaml"))


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
    assert times["ours"]["operations"] < times["ours, no shared prefix"]["operations"]
    assert times["ours, no shared prefix"]["operations"] <= times["paper"]["operations"]
    assert all(entry["share_of_matrix_rate"] > 0 for entry in times.values())
    assert cases["layers compiled"]["result"]["gradient_difference"] < 1e-5
    assert cases["profile of ours"]["result"]["operations"]


def test_memory_and_scoring_are_compared(results):
    memory = [found["result"]["estimated_over_measured"] for found in results["memory"]["cases"].values()]
    assert len(memory) == 4 and all(0.5 < ratio < 2 for ratio in memory), memory
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


def test_a_section_that_cannot_be_imported_does_not_stop_the_others(gpu, tmp_path, monkeypatch, capsys):
    module = ModuleType("gpu_sections.fake")
    module.cases = lambda run: [][1]
    monkeypatch.setitem(sys.modules, "gpu_sections.fake", module)
    record = gpu.run_section("fake", None, time.monotonic() + 60, tmp_path / "fake.json", {})
    assert json.loads((tmp_path / "fake.json").read_text()) == record and "IndexError" in record["error"]
    assert list(gpu.failures(record)) == ["fake"]


def test_a_lost_gpu_is_left_behind_for_a_new_process(gpu, tmp_path, monkeypatch, capsys):
    ran, started = [], []

    def run_section(name, *_):
        ran.append(name)
        return {"section": name, "cases": {"first": {"error": "CUDA error: an illegal memory access"}}}

    monkeypatch.setattr(gpu, "run_section", run_section)
    monkeypatch.setattr(gpu, "about", lambda arguments: {})
    monkeypatch.setattr(gpu, "is_lost", lambda device: True)
    monkeypatch.setattr(gpu.os, "execv", lambda program, words: started.append(words[2:]))
    words = ["--device", "cpu", "--tiny", "--seconds", "100", "--output", str(tmp_path)]
    with pytest.raises(SystemExit):  # where nothing starts, what failed is said
        gpu.main([*words, "--sections", "decode", "memory", "engines"])
    assert ran == ["decode"]
    again = gpu.parsed(started[0])
    assert again.sections == ["memory", "engines"] and again.failed == ["decode: first"]
    assert again.tiny and again.device == "cpu" and 90 < again.seconds <= 100


def test_quick_fits_into_nine_minutes(gpu):
    assert sum(gpu.QUICK_SECONDS.values()) + 30 <= 9 * 60  # imports, and what a case that is stopped still does


# ------------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def predictions(gpu):
    import predictions

    return predictions


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


def test_a_stepper_does_not_run_past_its_cache(gpu):
    from gpu_sections.common import small_model
    from gpu_sections.stepper import Stepper

    stepper = Stepper(small_model("qwen2", 2, torch.device("cpu")), torch.zeros(1, 3, dtype=torch.long), 1)
    stepper.step()
    with pytest.raises(ValueError, match="step 2 of a cache for 1"):
        stepper.step()


def test_a_step_on_paper_lacks_what_ours_leaves_out():
    """The committed counts; 18 of 36 layers are below the gap's neighbours."""
    counts = json.loads((BENCHMARKS / "results" / "healing_counts.json").read_text())
    paper, ours = counts["paper"], counts["ours"]
    layer = 2 * 4096 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    last_positions = 3 * 2 * 2 * 151_936 * 2048  # of each row, which predict nothing; student, teacher, and back
    assert paper["operations"] - ours["operations"] == 18 * layer + last_positions
    assert all(0 < ours[name] < paper[name] for name in ("operations", "weight_bytes", "peak_bytes"))


# ------------------------------------------------------------------------------------------------------------ tables


@pytest.fixture(scope="module")
def gpu_tables(predictions):
    import gpu_tables

    return gpu_tables


@pytest.fixture
def pages(tmp_path):
    return shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=lambda _, names: set(names) - PAGES)


PAGES = {"gpu.md", "parallel.md"}


def rows_of(page, first):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()
            if line.startswith(f"| {first} |")]  # fmt: skip


def test_the_pages_hold_what_is_committed(gpu_tables, pages):
    gpu_tables.main(["--docs", str(pages)])
    for name in PAGES:
        assert (pages / name).read_text() == (ROOT / "docs" / name).read_text(), "run benchmarks/gpu_tables.py"


def test_every_table_has_a_place(gpu_tables):
    text = "".join((ROOT / "docs" / name).read_text() for name in PAGES)
    counts = json.loads((BENCHMARKS / "results" / "healing_counts.json").read_text())
    places = [match[2] for match in gpu_tables.TABLE.finditer(text)]
    assert sorted(places) == sorted(gpu_tables.tables({}, counts))


def test_without_results_cells_say_what_to_run(gpu_tables, pages, tmp_path):
    gpu_tables.main([str(tmp_path / "nothing"), "--docs", str(pages)])
    page = (pages / "gpu.md").read_text()
    assert rows_of(page, "fsdp2.yaml") == [["fsdp2.yaml", *[gpu_tables.EMPTY] * 3]]
    assert page.count(gpu_tables.EMPTY) > 50 and "?" in (pages / "parallel.md").read_text()


def test_results_fill_the_tables(gpu_tables, pages, results, tmp_path):
    """The results of the tiny run, and the cell of a goal as a GPU would write it."""
    folder = tmp_path / "gpu"
    folder.mkdir()
    for name, record in results.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    decode = copy.deepcopy(results["decode"])
    entry = {"ratio": 1.257, "bytes_per_second": 2.5e12, "share_of_copy_bandwidth": 0.61, "seconds_per_step": 0.01}
    decode["cases"]["card"] = {"result": {"copy_bytes_per_second": 1e12, "bf16_operations_per_second": 1.0}}
    decode["cases"]["Qwen3-0.6B, batch 1, graphs"] = {"result": {"as it is": entry, "28 in 18": entry}}
    (folder / "decode.json").write_text(json.dumps(decode))
    gpu_tables.main([str(folder), "--docs", str(pages)])
    page = (pages / "gpu.md").read_text()
    assert "suite quick" in page and "CPU" in page
    goal, *_ = rows_of(page, "Qwen3-0.6B, 28 in 18, graphs, over all layers in sequence")
    assert goal[1] == ">= 1.25x" and goal[3] == "1.26x"
    assert [cells[3] for cells in rows_of(page, "Qwen3-0.6B") if "2.50e12" in cells[3]] == ["2.50e12, 61%"]
    assert any(re.fullmatch(r"5\.\d to 8\.\d", cells[3]) for cells in rows_of(page, "Qwen3-0.6B"))
    assert "x / 1.26x" in (pages / "parallel.md").read_text()
    correct = [row for case in results["correctness"]["cases"] for row in rows_of(page, case)]
    assert correct and all(row[-1] == "yes" for row in correct)
    for name in ("paper", "full logits", "ours", "ours, no shared weights", "layers compiled", "neighbours, LoRA",
                 "embedded teacher", "plain", "ddp_cpu.yaml", "fsdp2.yaml"):  # fmt: skip
        (row,) = rows_of(page, name)
        assert gpu_tables.EMPTY not in row or name == "layers compiled"  # no peak without a GPU


def test_a_case_that_failed_is_shown_as_such(gpu_tables):
    record = {"cases": {"resume": {"error": "RuntimeError: CUDA error"}, "scores": {"result": {"ok": False}}}}
    rows = rows_of(gpu_tables.correctness({"correctness": record}), "resume")
    assert rows == [["resume", "", "", "", "**failed**"]]
    assert "**no**" in gpu_tables.correctness({"correctness": record})
    engines = {"cases": {"plain": {"error": "stopped after 9 s"}, "fsdp2.yaml": {"error": "RuntimeError"}}}
    table = gpu_tables.engines({"engines": engines})
    assert [row[1] for name in engines["cases"] for row in rows_of(table, name)] == ["out of time", "failed"]


def test_results_of_nothing_stay_out_of_the_documents(gpu_tables, results, tmp_path, capsys):
    (tmp_path / "decode.json").write_text(json.dumps(results["decode"]))
    with pytest.raises(SystemExit):
        gpu_tables.main([str(tmp_path)])
    assert "--tiny" in capsys.readouterr().err
