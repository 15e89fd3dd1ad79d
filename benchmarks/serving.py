"""Decode speed of models in vLLM at batch 1, relative to the first, all measured in turns in one process.

.venv-serve/vllm/bin/python benchmarks/serving.py TEACHER STUDENT ... --output speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that the engine's time is this process's

import vllm
from vllm import LLM, SamplingParams

from hf_layerprune.environment import environment

PROMPT = {"prompt_token_ids": list(range(100, 132))}
FEW, MANY = 2, 66


def seconds_of(llm: LLM, count: int, clock) -> float:
    began = clock()
    llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
    return clock() - began


def step(llm: LLM, clock) -> float:
    """Seconds of a decode step: what many tokens take more than few, after the same prompt."""
    return (seconds_of(llm, MANY, clock) - seconds_of(llm, FEW, clock)) / (MANY - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders; the first is what the others are compared with")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--cpu_time", action="store_true", help="CPU time, for a machine that does other things too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    engine = {"dtype": args.dtype, "enforce_eager": args.eager, "max_model_len": 256}
    llms = {name: LLM(name, trust_remote_code=True, kv_cache_memory_bytes=2**27, **engine) for name in args.models}
    for llm in llms.values():
        seconds_of(llm, MANY, clock)
    rounds = [{name: step(llm, clock) for name, llm in llms.items()} for _ in range(args.repeats)]
    first = args.models[0]
    found = {
        name: {
            "tokens_per_second": 1 / median(row[name] for row in rounds),
            "ratio": median(row[first] / row[name] for row in rounds),
        }
        for name in args.models
    }
    for name, row in found.items():
        print(f"{name}: {row['tokens_per_second']:.1f} tokens/s, {row['ratio']:.2f}x")
    if args.output:
        settings = {"threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND"), "clock": clock.__name__, **engine}
        result = {
            "environment": environment() | {"vllm": vllm.__version__},
            "settings": settings,
            "models": found,
            "rounds": rounds,
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
