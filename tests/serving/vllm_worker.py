"""vLLM, offline, on one folder: the greedy tokens of prompts, their log-probabilities, and decode tokens/s.

hf_layerprune is not imported here, so a student with pairs is read as a stranger's machine reads it, as remote code.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: str, output: Path, asked: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, trust_remote_code=True, disable_log_stats=True, kv_cache_memory_bytes=2**28, **asked["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, logprobs=0)
    rows = [row.outputs[0] for row in llm.generate(prompts, greedy, use_tqdm=False)]
    logprobs = [[next(iter(step.values())).logprob for step in row.logprobs] for row in rows]
    found = {"tokens": [list(row.token_ids) for row in rows], "logprobs": logprobs, "seconds_per_token": []}
    for _ in range(asked.get("repeats", 0)):
        found["seconds_per_token"].append(seconds_per_token(llm, prompts[0], SamplingParams))
    output.write_text(json.dumps(found))


def seconds_per_token(llm, prompt: dict, sampling: type, few: int = 2, many: int = 66) -> float:
    """Seconds of a decode step at batch 1: what `many` tokens take more than `few` do, which share the prompt."""
    seconds = []
    for count in (few, many):
        began = time.perf_counter()
        llm.generate([prompt], sampling(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (many - few)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
