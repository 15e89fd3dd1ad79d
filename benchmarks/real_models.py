"""Measure real checkpoints against their teacher: text, tasks, code and chat answers.

    python benchmarks/real_models.py --teacher TEACHER --held_out DIR --output_dir DIR LABEL=CHECKPOINT ...

A checkpoint is a model folder; or a folder of a round with `:unhealed`, the same plan applied to the teacher (merges
fitted to --repair_on), or with `:repaired`, that with every gap refitted by least squares on --repair_on. One JSON
file per checkpoint; what is in one that is there is not measured again, so an interrupted call goes on. Each holds:

* perplexity and KL(teacher || student), nats per token, on modern text and on the teacher's own chat answers, with
  the values of every row, so that two students can be compared in pairs;
* accuracy on ARC-easy, PIQA, HellaSwag, WinoGrande and LAMBADA (200 to 300 fixed items each, zero-shot), and the mean;
* HumanEval: share of 40 problems that a greedy completion solves, run in a subprocess with limits;
* chat: share of 40 answers that end by themselves within 192 tokens, and the share of repeated 4-grams in them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_layerprune import LayerPlan, apply_plan, load_model, load_tokenizer, merge, tokenized_batches
from hf_layerprune.compensation import compensate
from hf_layerprune.data import load_text_dataset
from hf_layerprune.environment import environment, has_bf16
from hf_layerprune.loading import load_config
from hf_layerprune.surgery import plan_of
from hf_layerprune.tasks import evaluate_tasks, load_tasks

DATA = Path(__file__).parent.parent / "recipes" / "data"
ROWS, LENGTH = 24, 256
NUM_CODE, CODE_TOKENS = 40, 256
NUM_CHATS, CHAT_TOKENS = 40, 192
STATES = ("", "unhealed", "repaired")
CODE_ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\n@")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def a_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_of_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    batches = tokenized_batches(load_text_dataset(str(path)), tokenizer, max_length=LENGTH, num_rows=ROWS)
    return torch.cat([batch["input_ids"] for batch in batches])


@torch.no_grad()
def text_quality(model: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> dict[str, Any]:
    """Perplexity and KL to the teacher; the plain formula, one row at a time."""
    nll, kl = [], []
    for ids in rows.to(model.device).split(1):
        student, original = (m(ids).logits[0, :-1].float().log_softmax(-1) for m in (model, teacher))
        nll.append(-student.gather(-1, ids[0, 1:, None]).mean().item())
        kl.append((original.exp() * (original - student)).sum(-1).mean().item())
    mean = sum(kl) / len(kl)
    return {"perplexity": math.exp(sum(nll) / len(nll)), "kl": mean, "kl_se": standard_error(kl), "kl_rows": kl}


def standard_error(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std().item() / len(values) ** 0.5


def batches_by_length(rows: list[Any], length: Any, size: int) -> Iterator[list[Any]]:
    rows = sorted(rows, key=length)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@torch.no_grad()
def lambada(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Share of contexts after which the greedy continuation is the right word."""
    rows = []
    for row in json_lines(DATA / "lambada.jsonl"):
        context = tokenizer(row["context"])["input_ids"]
        rows.append((context, tokenizer(f"{row['context']} {row['continuation']}")["input_ids"][len(context) :]))
    right = []
    for part in batches_by_length(rows, lambda row: len(row[0]), 16):
        width = max(len(context) + len(word) for context, word in part)
        ids = torch.tensor([c + w + [0] * (width - len(c) - len(w)) for c, w in part], device=model.device)
        states = model.base_model(ids).last_hidden_state  # causal: padding on the right changes nothing before it
        for state, (context, word) in zip(states, part, strict=True):
            logits = model.lm_head(state[len(context) - 1 : len(context) + len(word) - 1])
            right.append(float(logits.argmax(-1).tolist() == word))
    return {"accuracy": sum(right) / len(right), "se": standard_error(right), "num": len(right)}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new: int,
    ends: tuple[str, ...] = (),
) -> list[tuple[str, bool]]:
    """Greedy continuations in the order of the prompts, and whether each ended by itself."""
    answers: dict[int, tuple[str, bool]] = {}
    tokenizer.padding_side = "left"
    for part in batches_by_length(list(enumerate(prompts)), lambda item: len(item[1]), 20):
        batch = tokenizer([prompt for _, prompt in part], return_tensors="pt", padding=True, add_special_tokens=False)
        batch = batch.to(model.device)
        stop = {"stop_strings": list(ends), "tokenizer": tokenizer} if ends else {}
        ids = model.generate(**batch, max_new_tokens=new, do_sample=False, repetition_penalty=1.0, **stop)
        for (number, _), row in zip(part, ids[:, batch["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            answers[number] = (text, tokenizer.eos_token_id in row.tolist())
    return [answers[number] for number in range(len(prompts))]


def limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def passes(program: str) -> bool:
    """Whether a program ends well, in a process, folder and environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", program]
        try:
            done = subprocess.run(command, cwd=folder, env={}, timeout=15, capture_output=True, preexec_fn=limits)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def humaneval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    problems = json_lines(DATA / "humaneval.jsonl")[:NUM_CODE]
    answers = generate(model, tokenizer, [row["prompt"] for row in problems], CODE_TOKENS, CODE_ENDS)
    right = []
    for row, (text, _) in zip(problems, answers, strict=True):
        for end in CODE_ENDS:
            text = text.split(end)[0]
        right.append(float(passes(f"{row['prompt']}{text}\n{row['test']}\ncheck({row['entry_point']})\n")))
    return {"pass@1": sum(right) / len(right), "se": standard_error(right), "num": len(right)}


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompts = [row["prompt"] for row in json_lines(DATA / "mt_bench.jsonl")[: 2 * NUM_CHATS : 2]]
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    answers = generate(model, tokenizer, rendered, CHAT_TOKENS)
    repeated = []
    for text, _ in answers:
        words = text.split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    shown = [{"prompt": p, "answer": text} for p, (text, _) in list(zip(prompts, answers, strict=True))[:4]]
    return {
        "ends": sum(ended for _, ended in answers) / len(answers),
        "repetition": sum(repeated) / len(repeated),
        "num": len(answers),
        "shown": shown,
    }


def generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"humaneval": humaneval(model, tokenizer), "answers": chat(model, tokenizer)}


def likelihoods(
    model: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {"num_layers": model.config.num_hidden_layers, "num_parameters": model.num_parameters()}
    for kind in ("text", "chat"):
        found[kind] = text_quality(model, teacher, rows_of_text(held_out / f"held_out_{kind}.jsonl", tokenizer))
    tasks = evaluate_tasks(model, load_tasks(str(DATA / "tasks.yaml")), tokenizer, batch_size=32)
    found["tasks"] = {
        name: {"accuracy": result.quality, "se": result.standard_error, "num": result.num_examples}
        for name, result in tasks.results.items()
    }
    found["tasks"]["lambada"] = lambada(model, tokenizer)
    each = found["tasks"].values()
    found["task_mean"] = sum(task["accuracy"] for task in each) / len(each)
    found["task_mean_se"] = sum(task["se"] ** 2 for task in each) ** 0.5 / len(each)
    return found


def checkpoint_named(name: str, teacher: PreTrainedModel, repair_rows: list[dict[str, Tensor]]) -> PreTrainedModel:
    """A model folder, or its plan applied to the teacher."""
    folder, _, state = name.partition(":")
    if not state:
        return load_model(folder, "float32").to(teacher.device).eval()
    plan = LayerPlan.from_dict(load_config(folder).layer_plan)
    model = apply_plan(teacher, plan.before_merges(plan_of(teacher)), share_weights=True)
    if plan.merged:
        model = merge(model, plan.merged, repair_rows, teacher, share_weights=True)
    if state == "repaired":
        model = compensate(model, repair_rows, "least_squares", teacher, share_weights=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=CHECKPOINT")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--held_out", type=Path, required=True, help="folder that recipes/data/mix.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--repair_on", type=Path, help="text that repairs and merges are fitted to")
    parser.add_argument("--repair_rows", type=int, default=48, help="rows of it, of LENGTH tokens")
    parser.add_argument("--no_generation", action="store_true", help="leave out code and chat answers")
    parser.add_argument("--float32", action="store_true", help="also where the hardware computes bfloat16 natively")
    args = parser.parse_args()
    for item in args.checkpoints:
        if (state := item.partition("=")[2].partition(":")[2]) not in STATES:
            sys.exit(f"{item}: no state {state!r} of a checkpoint; choose {' or '.join(STATES[1:])}, or leave it out")

    device = a_device()
    half = has_bf16(use_cpu=device.type == "cpu") and not args.float32
    context = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    teacher, tokenizer = load_model(args.teacher, "float32").to(device).eval(), load_tokenizer(args.teacher)
    repair_rows = []
    if args.repair_on:
        text = load_text_dataset(str(args.repair_on))
        repair_rows = tokenized_batches(text, tokenizer, max_length=LENGTH, num_rows=args.repair_rows)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    ways = {"tasks": lambda model: likelihoods(model, teacher, tokenizer, args.held_out)}
    if not args.no_generation:
        ways["humaneval"] = lambda model: generation(model, tokenizer)  # of all checkpoints last: it takes longest
    for (missing, way), item in product(ways.items(), args.checkpoints):
        label, _, checkpoint = item.partition("=")
        path = args.output_dir / f"{label}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if missing in known:
            continue
        start = time.perf_counter()
        model = teacher if checkpoint == args.teacher else checkpoint_named(checkpoint, teacher, repair_rows)
        with context:
            found = known | way(model)
        found["seconds"] = round(known.get("seconds", 0) + time.perf_counter() - start, 1)
        where = {"compute": "bfloat16" if half else "float32", "machine": platform.machine()}
        where |= {"threads": torch.get_num_threads(), "environment": environment()}
        path.write_text(json.dumps({"label": label} | where | found, indent=1) + "\n", encoding="utf-8")
        tasks = ", ".join(f"{name} {task['accuracy']:.3f}" for name, task in found["tasks"].items())
        mean = f"task mean {found['task_mean']:.4f} +- {found['task_mean_se']:.4f} ({tasks})"
        text = ", ".join(f"{k} ppl {found[k]['perplexity']:.2f} kl {found[k]['kl']:.4f}" for k in ("text", "chat"))
        print(f"{label}: {found['num_layers']} layers, {mean}; {text}; {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
