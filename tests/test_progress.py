import io
import json

import pytest
from conftest import tiny_config, tiny_model
from rich.console import Console

from hf_layerprune import IterativeLayerDistillTrainer
from hf_layerprune.progress import RunProgress


def run(tmp_path, tokenizer, texts, **changes):
    trainer = IterativeLayerDistillTrainer(
        model=tiny_model(), args=tiny_config(tmp_path, **changes), train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    seen = []
    with RunProgress(trainer, console) as progress:
        trainer.add_callback(progress)
        update = progress.bar.update
        progress.bar.update = lambda task, **values: (seen.append(values.get("description")), update(task, **values))
        trainer.train()
        task = progress.bar.tasks[0]
        assert task.completed == pytest.approx(task.total, rel=0.01), "the time left was wrong"
    return progress, [text for text in seen if text], console.file.getvalue()


def test_the_bar_tells_the_round_and_what_is_happening_and_ends_near_its_end(tmp_path, tokenizer, texts):
    progress, seen, printed = run(tmp_path, tokenizer, texts)
    assert seen[0] == "evaluating teacher"
    assert "round 1/2, 5 layers: scoring" in seen and "round 2/2, 3 layers: healing" in seen
    assert progress.bar.tasks[0].finished
    assert printed.count(": remove ") == 2


def test_prompts_that_were_cut_are_told(tmp_path, tokenizer, texts):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "why? " * 80, "choices": ["a", "b"], "answer": 0}))
    (tmp_path / "tasks.yaml").write_text("- {kind: multiple_choice, dataset: rows.jsonl, prompt: '{q}'}")
    settings = {"tasks": str(tmp_path / "tasks.yaml"), "target_num_layers": 4}
    trainer = IterativeLayerDistillTrainer(
        model=tiny_model(), args=tiny_config(tmp_path / "run", **settings), train_dataset=texts, eval_dataset=texts,
        processing_class=tokenizer,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    with RunProgress(trainer, console):
        pass
    assert "task rows: prompts too long for the model lost their beginning (2)" in console.file.getvalue()


def test_rounds_without_healing(tmp_path, tokenizer, texts):
    run(tmp_path, tokenizer, texts, heal=False)


def test_several_layers_a_round(tmp_path, tokenizer, texts):
    progress, seen, _ = run(tmp_path, tokenizer, texts, layers_per_round=2, target_num_layers=2)
    assert progress.rounds == "/2"
