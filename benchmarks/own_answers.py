"""Healing on given text against healing on the teacher's own continuations of it, on equal tokens.

    python benchmarks/own_answers.py --output_dir runs/own_answers --output benchmarks/results/own_answers.json

One student of the embedded teacher (four of its 16 layers removed, the same for all) is healed by `embedded.yaml`: on
the beginnings of passages of books; on what the teacher writes after the first words of the same passages, sampled as
its generation config says and from its whole distribution; and half on the one, half on the other. Every way sees the
same number of steps and of tokens. Measured: loss and KL on held-out books, and KL on what the teacher itself writes
after the first words of those. Answers that are there already are not generated again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_layerprune import (
    HealingDataConfig,
    IterativeLayerDistillConfig,
    IterativeLayerDistillTrainer,
    embedded_dataset,
    evaluate_model,
    generate_healing_data,
    prune,
)
from hf_layerprune.data import Batch, tokenized_batches
from hf_layerprune.environment import environment
from hf_layerprune.files import to_json, write_atomically
from hf_layerprune.loading import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
OWN, WHOLE = {}, {"temperature": 1.0, "top_k": 0}
ANSWERS = {"prompt_tokens": 32, "max_new_tokens": 160, "batch_size": 64}


def answers(
    name: str, folder: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, **settings: Any
) -> tuple[Dataset, dict[str, Any]]:
    """What the teacher writes after the openings of some passages, and how long that took."""
    path, config, start = folder / f"{name}.jsonl", HealingDataConfig(**ANSWERS | settings), time.perf_counter()
    report = generate_healing_data(teacher, embedded_dataset(source), path, config, tokenizer)
    seconds = time.perf_counter() - start
    print(f"{name}: {report}, {seconds:.0f} s")
    rows = load_dataset("json", data_files=str(path), split="train")
    return Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in rows]}), asdict(report)


def heal(
    start: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, seed: int
) -> IterativeLayerDistillTrainer:
    """One round: a layer goes, the rest is healed on `rows` as `embedded.yaml` says."""
    recipe = yaml.safe_load((ROOT / "benchmarks" / "embedded.yaml").read_text())
    recipe |= {"target_num_layers": start.config.num_hidden_layers - 1, "seed": seed, "save_strategy": "no"}
    recipe |= {"measure_speed": False, "disable_tqdm": True}
    del recipe["model"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = IterativeLayerDistillTrainer(
            model=start,
            args=IterativeLayerDistillConfig(**recipe | {"output_dir": folder}),
            train_dataset=rows,
            eval_dataset=embedded_dataset("held_out"),
            calibration_dataset=embedded_dataset("calibration"),
            processing_class=tokenizer,
            teacher=teacher,
        )
        trainer.train()
    return trainer


def measured(trainer: IterativeLayerDistillTrainer, teacher: PreTrainedModel, own_text: list[Batch]) -> dict[str, Any]:
    record = trainer.run.rounds[0]
    on_own = evaluate_model(trainer.model, own_text, teacher)
    return {
        "removed_layers": [edit.layers[0] for edit in record.edits],
        "tokens": record.healing.num_tokens,
        "loss_before": record.before_healing.loss,
        "kl_before": record.before_healing.kl,
        "loss": record.quality.loss,
        "kl": record.quality.kl,
        "kl_on_teachers_own_text": on_own.kl,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/own_answers"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/own_answers.json"))
    parser.add_argument("--num_prompts", type=int, default=480)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    teacher = load_model("embedded", dtype=torch.float32).eval()
    tokenizer = load_tokenizer("embedded")
    folder, count = arguments.output_dir, arguments.num_prompts
    own, own_report = answers("own", folder, teacher, tokenizer, "healing", num_prompts=count, **OWN)
    whole, whole_report = answers("whole", folder, teacher, tokenizer, "healing", num_prompts=count, **WHOLE)
    unseen, _ = answers("unseen", folder, teacher, tokenizer, "held_out", num_prompts=64, seed=1, **WHOLE)
    own_text = tokenized_batches(unseen, tokenizer, max_length=256, num_rows=32)
    length = ANSWERS["prompt_tokens"] + ANSWERS["max_new_tokens"]
    passages = tokenizer(embedded_dataset("healing")[:count]["text"])["input_ids"]
    given = Dataset.from_dict({"text": [tokenizer.decode(ids[:length]) for ids in passages]})
    half = count // 2
    ways = {
        "given text": given,
        "teacher's text, its own sampling": own,
        "teacher's text, whole distribution": whole,
        "half given, half teacher's": Dataset.from_dict({"text": given[half:]["text"] + whole[:half]["text"]}),
    }
    gone = (1, 2, 10)
    start = prune(teacher, gone)
    results: dict[str, Any] = {name: [] for name in ways}
    for seed in arguments.seeds:
        for name, rows in ways.items():
            results[name].append(measured(heal(start, teacher, tokenizer, rows, seed), teacher, own_text))
            print(seed, name, results[name][-1], flush=True)
    print(f"\n{'healed on':36} {'loss':>8} {'KL':>8} {'KL on its own text':>20}")
    for name, of_one in results.items():
        mean = {key: statistics.mean(run[key] for run in of_one) for key in ("loss", "kl", "kl_on_teachers_own_text")}
        print(f"{name:36} {mean['loss']:8.4f} {mean['kl']:8.4f} {mean['kl_on_teachers_own_text']:20.4f}")
    content = {
        "command": "python benchmarks/own_answers.py",
        "environment": environment(),
        "settings": {"removed_first": gone, "answers": ANSWERS | {"num_prompts": count}, "seeds": arguments.seeds},
        "answers": {"its own sampling": own_report, "whole distribution": whole_report},
        "results": results,
    }
    write_atomically(arguments.output, to_json(content))


if __name__ == "__main__":
    main()
