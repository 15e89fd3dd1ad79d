"""Results on benchmarks that the Hub keeps a leaderboard of: `.eval_results/*.yaml` of a student.

https://huggingface.co/docs/hub/eval-results
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from ..errors import LayerPruneError
from ..files import write_atomically
from ..plan import LayerPlan
from ..record import from_json_value
from ..tasks import TaskResult
from .runs import Run

FOLDER = ".eval_results"


@dataclass(frozen=True)
class Benchmark:
    """A data set of the Hub with a leaderboard."""

    dataset: str  # its Hub id
    task: str  # its id in the data set's `eval.yaml`
    num_examples: int  # rows of its test split; a result on fewer is another number


BENCHMARKS = {"gsm8k": Benchmark("openai/gsm8k", "gsm8k", 1319)}
"""Name of a task, in lm-eval and in `TaskReport.results`, to the benchmark it measures."""
BENCHMARK_FILES = [f"{FOLDER}/{name}.yaml" for name in BENCHMARKS]
Results = dict[str, TaskResult]


def read_evaluation(path: str | Path, run: Run, numbers: Sequence[int]) -> dict[int, Results]:
    """What an `evaluation.json` says of benchmarks, by the number of the round whose student it measured."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = LayerPlan.from_dict(content["plan"])
        results = from_json_value(Results, content["tasks"], "tasks")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LayerPruneError(
            f"evaluation {path} is not an evaluation.json with tasks ({error!r:.80}); hf-layerprune evaluate --tasks "
            "... --output_dir writes one"
        ) from None
    of_plan = [number for number in numbers if run.record.rounds[number - 1].plan == plan]
    if not of_plan:
        raise LayerPruneError(f"evaluation {path} is of a student with other layers than those that are pushed")
    wrong = [f"{name} {why}" for name, result in results.items() if (why := _no_benchmark(name, result, run))]
    if wrong:
        raise LayerPruneError(f"evaluation {path} holds what no leaderboard takes: {'; '.join(wrong)}")
    return {of_plan[-1]: results}


def _no_benchmark(name: str, result: TaskResult, run: Run) -> str | None:
    if name not in BENCHMARKS:
        return f"is not among {', '.join(BENCHMARKS)}"
    if result.num_examples != (whole := BENCHMARKS[name].num_examples):
        return f"was measured on {result.num_examples:,} of its {whole:,} examples"
    chose = run.record.teacher.tasks is not None and name in run.record.teacher.tasks.results
    return "chose the layers" if chose else None


def write_benchmarks(folder: Path, results: Results) -> None:
    """Write a file for each result, the value in percent as leaderboards show it."""
    for name, result in results.items():
        benchmark = BENCHMARKS[name]
        notes = f"{result.measure}, measured by hf-layerprune evaluate"
        entry = EvalResultEntry(benchmark.dataset, benchmark.task, round(100 * result.quality, 2), notes=notes)
        (folder / FOLDER).mkdir(exist_ok=True)
        content = eval_result_entries_to_yaml([entry])
        write_atomically(folder / FOLDER / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False))
