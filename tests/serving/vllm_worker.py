"""vLLM, offline, on one folder: the greedy tokens of prompts and their log-probabilities.

hf_layerprune is not imported here, so a student with pairs is read as a stranger's machine reads it, as remote code.
"""

import json
import os
import sys
from pathlib import Path


def main(folder: str, output: Path, asked: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, trust_remote_code=True, disable_log_stats=True, kv_cache_memory_bytes=2**28, **asked["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, logprobs=0)
    rows = [row.outputs[0] for row in llm.generate(prompts, greedy, use_tqdm=False)]
    logprobs = [[next(iter(step.values())).logprob for step in row.logprobs] for row in rows]
    found = {"tokens": [list(row.token_ids) for row in rows], "logprobs": logprobs}
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
