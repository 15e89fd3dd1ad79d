"""Do the speeds the demo shows agree with `hf-layerprune benchmark` on the same machine?

    python benchmarks/demo_speed.py --output benchmarks/results/demo_speed.json

The same two models, prompts of the same length and as many new tokens, in turns, so that what else the machine does
falls on both: the benchmark, then a comparison by `hf-layerprune demo`, a process of its own that is asked through its
API. The verdict is the last line, and the exit status. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import re
import statistics
import subprocess
import sys
from pathlib import Path

from gradio_client import Client

from hf_layerprune import embedded_dataset
from hf_layerprune.benchmark import benchmark_models
from hf_layerprune.demo import open_catalog, settings_of
from hf_layerprune.demo.catalog import ModelStore
from hf_layerprune.environment import environment

LIMIT = 0.15
"""How far the demo may be from the benchmark."""
FEWEST = 0.5
"""Share of the tokens asked for that an answer must have, to be measured well."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="a run, or an original and a student; default: as in the demo")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)

    settings = settings_of(arguments.models)
    demo = subprocess.Popen(
        [sys.executable, "-m", "hf_layerprune.cli", "demo", *arguments.models],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    atexit.register(demo.kill)
    said = ""
    while not (url := re.search(r"http://[\d.]+:\d+", said)):
        line = demo.stdout.readline()
        if not line:
            raise SystemExit(f"the demo was not served: {said}")
        said += line
    client = Client(url.group(), verbose=False)
    (pairing,) = open_catalog(settings).values()
    sources = {"original": pairing.teacher, "compressed": pairing.student()}
    store = ModelStore(len(sources), settings.dtype)
    models = [store.get(source) for source in sources.values()]  # the benchmark's own
    prompt = prompt_of(pairing.tokenizer, arguments.prompt_tokens)

    # greedy, as the benchmark is; and with the original's own sampling, as visitors get it
    kinds = {"greedy": {"temperature": 0.0, "repetition_penalty": 1.0}, "sampled": {}}
    measured: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in ("benchmark", *kinds)} for name in sources
    }
    for _ in range(arguments.repeats):
        reports = benchmark_models(models, arguments.prompt_tokens, arguments.new_tokens, repeats=1)
        for name, report in zip(sources, reports, strict=True):
            measured[name]["benchmark"].append(report.decode_tokens_per_second)
        for kind, sampling in kinds.items():
            answer = client.predict(prompt, max_new_tokens=arguments.new_tokens, api_name="/compare", **sampling)
            for name in sources:
                if answer[name]["num_tokens"] < FEWEST * arguments.new_tokens:
                    raise SystemExit(f"{name}, {kind}: it ended after {answer[name]['num_tokens']} tokens")
                measured[name][kind].append(answer[name]["tokens_per_second"])
    client.close()

    results = {name: compared(values) for name, values in measured.items()}
    settings_used = {key: value for key, value in vars(arguments).items() if key not in ("output", "models")}
    content = {
        "settings": settings_used,
        "environment": environment(),
        "verdict": verdict(results),
        "results": results,
    }
    text = json.dumps(content, indent=1) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)
    print(content["verdict"]["summary"])
    raise SystemExit(not content["verdict"]["agrees"])


def prompt_of(tokenizer, num_tokens: int) -> str:
    """Real text that is this many tokens long."""
    ids = tokenizer(embedded_dataset("held_out")[0]["text"])["input_ids"]
    for length in range(num_tokens, 0, -1):
        text = tokenizer.decode(ids[:length])
        if len(tokenizer(text)["input_ids"]) == num_tokens:
            return text
    raise SystemExit(f"no text of {num_tokens} tokens")


def compared(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of tokens/s, and the median ratio to the benchmark of the same turn."""
    result: dict[str, dict[str, float]] = {}
    for kind, speeds in values.items():
        ratios = [speed / base for speed, base in zip(speeds, values["benchmark"], strict=True)]
        result[kind] = {"tokens_per_second": statistics.median(speeds), "ratio": statistics.median(ratios)}
    return result


def verdict(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    """Whether every speed of the demo is close enough, and which is farthest off."""
    ratios = {f"{name}, {kind}": of["ratio"] for name, kinds in results.items() for kind, of in kinds.items()}
    where = max(ratios, key=lambda key: abs(ratios[key] - 1))
    apart = abs(ratios[where] - 1)
    agrees = apart <= LIMIT
    summary = f"{'AGREES' if agrees else 'DISAGREES'}: at most {apart:.1%} apart ({where}); {LIMIT:.0%} is allowed"
    return {"agrees": agrees, "farthest": apart, "limit": LIMIT, "summary": summary}


if __name__ == "__main__":
    main()
