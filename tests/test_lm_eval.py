"""Tasks of lm-eval; those that run it are skipped where it is not installed."""

import json

import pytest
import yaml

from hf_layerprune import LayerPruneError, prune, score_layers
from hf_layerprune.tasks import LmEvalTask, MultipleChoiceTask, evaluate_tasks, load_tasks
from hf_layerprune.tasks.kinds import costs_of_samples

ROWS = [
    {"question": "Who leads the team?", "options": ["(A)accountant", "(B)salesperson", "(C)driver"], "label": "B"},
    {"question": "Which can be derived?", "options": ["(A)the park is north", "(B)it is southwest"], "label": "A"},
    {"question": "What follows?", "options": ["(A)nothing", "(B)everything", "(C)something"], "label": "C"},
]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def write_theirs(tmp_path, rows_file):
    """A task in lm-eval's format, and the YAML file it stands in."""
    pytest.importorskip("lm_eval")

    def write(name, **settings):
        settings = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows_file}},
            "test_split": "test", "doc_to_text": "{{question}}",
        } | settings  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


CHOICES = {
    "output_type": "multiple_choice", "doc_to_choice": "{{options}}",
    "doc_to_target": "{{['A', 'B', 'C'].index(label)}}", "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def test_lm_eval_is_an_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(LayerPruneError, match=r"task arc_easy: lm-eval is not installed; pip install"):
        load_tasks("lm_eval:arc_easy")[0].prepare(tokenizer)


def logged(value, metric="acc", filter="none"):
    return {"metrics": [metric, "other"], metric: value, "other": 0.5, "filter": filter}


def test_costs_of_what_lm_eval_logged():
    rows = [logged(1.0), logged(0.0)]
    assert costs_of_samples({"a": rows, "b": rows[:1]}).tolist() == [0, 1, 0]
    with pytest.raises(LayerPruneError, match=r"lm-eval task a: its first metric, ppl, must be a number in \[0, 1\]"):
        costs_of_samples({"a": [logged(31.0, "ppl")]})


def test_an_example_counts_once_by_the_first_filter_of_its_task():
    strict = [logged(value, filter="strict-match") for value in (0.0, 1.0)]
    flexible = [logged(1.0, filter="flexible-extract") for _ in range(2)]
    assert costs_of_samples({"a": strict + flexible, "b": flexible}).tolist() == [1, 0, 0, 0]


def test_a_task_of_its_own_format(model, tokenizer, write_theirs, rows_file):
    tasks = load_tasks("lm_eval:" + write_theirs("theirs", **CHOICES))
    own = MultipleChoiceTask(rows_file, name="own", choices="options", answer="label")
    report = evaluate_tasks(model, [*tasks, own], tokenizer)
    assert report.results["theirs"].quality == report.results["own"].quality
    assert report.results["theirs"].num_examples == 3


def test_layers_are_scored_by_it_and_the_data_is_read_once(model, tokenizer, write_theirs, monkeypatch):
    from lm_eval.tasks import TaskManager

    load, loaded = TaskManager.load, []
    monkeypatch.setattr(TaskManager, "load", lambda *arguments: loaded.append(1) or load(*arguments))
    (task,) = load_tasks("lm_eval:" + write_theirs("theirs", num_fewshot=1, fewshot_split="test", **CHOICES))
    scores = score_layers(model, None, "tasks", layers=[1, 2], tasks=[task], tokenizer=tokenizer)
    assert len(loaded) == 1
    for layer, value in scores.values.items():
        assert value == evaluate_tasks(prune(model, [layer]), [task], tokenizer).mean_cost


def test_an_answer_read_by_several_filters(model, tokenizer, write_theirs):
    def filtered(name, pattern):
        return {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}

    path = write_theirs(
        "written", output_type="generate_until", doc_to_target="{{label}}",
        generation_kwargs={"max_gen_toks": 4, "until": ["\n"]}, metric_list=[{"metric": "exact_match"}],
        filter_list=[filtered("strict", "never (written)"), filtered("flexible", "([A-C])")],
    )  # fmt: skip
    result = evaluate_tasks(model, load_tasks(f"lm_eval:{path}"), tokenizer).results["written"]
    assert (result.num_examples, result.quality) == (3, 0)


def test_a_yaml_list_limits_and_weighs_it(model, tokenizer, write_theirs, tmp_path):
    write_theirs("theirs", **CHOICES)
    (tmp_path / "mine.yaml").write_text("- {kind: lm_eval, dataset: theirs.yaml, limit: 2, weight: 3, name: short}\n")
    (task,) = load_tasks(str(tmp_path / "mine.yaml"))
    assert isinstance(task, LmEvalTask) and (task.name, task.weight) == ("short", 3)
    assert evaluate_tasks(model, [task], tokenizer).results["short"].num_examples == 2


def test_mistakes_with_it(tokenizer, write_theirs):
    with pytest.raises(LayerPruneError, match="task no_such_task: lm-eval cannot load it: .*no_such_task"):
        load_tasks("lm_eval:no_such_task")[0].prepare(tokenizer)
    path = write_theirs("broken", **CHOICES | {"doc_to_choice": "{{missing}}"})
    with pytest.raises(LayerPruneError, match="task broken: lm-eval cannot load it: 'missing' is undefined$"):
        load_tasks(f"lm_eval:{path}")[0].prepare(tokenizer)
