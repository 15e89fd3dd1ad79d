"""A run of the command line in accelerate's engines, with one process, against one that no engine holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from gpu_sections.common import Case, Run
from hf_layerprune import embedded_dataset

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
ALLOWED = 0.02
"""Relative difference of KL to the plain run's."""


def cases(run: Run) -> list[Case]:
    engines = ["ddp.yaml" if run.on_gpu else "ddp_cpu.yaml", "fsdp2.yaml"]
    return [("plain", partial(plain, run)), *((name, partial(in_engine, run, name)) for name in engines)]


def words(run: Run, folder: Path) -> list[str]:
    """A round of the embedded teacher, all weights healed."""
    texts = run.scratch / "texts.jsonl"
    if not texts.exists():
        embedded_dataset("calibration").select(range(8 if run.tiny else 64)).to_json(texts)
    settings = {
        "model": "embedded", "output_dir": folder, "target_num_layers": 15, "max_steps": 3, "trained_layers": "all",
        "per_device_train_batch_size": 2 if run.tiny else 8, "max_length": 32 if run.tiny else 256,
        "num_calibration_samples": 2, "num_eval_samples": 2 if run.tiny else 16, "criterion": "block_influence",
        "packing": "true", "packing_strategy": "wrapped", "measure_speed": "false", "report_to": "none",
        "save_strategy": "no", "dataset": texts, "eval_dataset": texts, "bf16": str(run.on_gpu).lower(),
        "use_cpu": str(not run.on_gpu).lower(),
    }  # fmt: skip
    return ["compress", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def start(*arguments: object) -> None:
    """Run Python to its end; a failure is an error with the end of what it printed. Nothing it starts outlives it."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": paths},
    ) as process:  # fmt: skip
        try:
            printed, _ = process.communicate()
        except BaseException:
            process.terminate()  # torchrun then ends the processes it has started
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            raise
    if process.returncode:
        _, _, traceback = printed.partition("Traceback")  # the first one is not the launcher's
        raise RuntimeError(f"exit status {process.returncode}: {traceback[:2500] or printed[-1500:]}")


def measured(folder: Path, seconds: float) -> dict[str, Any]:
    last = json.loads((folder / "report.json").read_text())["rounds"][-1]
    return {"seconds": seconds, "kl": last["quality"]["kl"], "loss": last["quality"]["loss"]}


def plain(run: Run) -> dict[str, Any]:
    folder, began = run.scratch / "plain", time.monotonic()
    start("-m", "hf_layerprune.cli", *words(run, folder))
    return measured(folder, time.monotonic() - began)


def in_engine(run: Run, config: str) -> dict[str, Any]:
    folder, began = run.scratch / config, time.monotonic()
    settings: tuple[object, ...] = ("--config_file", CONFIGS / config, "--num_processes", 1)
    program: tuple[object, ...] = ("-m", "hf_layerprune.cli")
    if not run.on_gpu:
        settings += ("--mixed_precision", "no")
        program = (ROOT / "tests" / "cpu_engine.py",) if config == "fsdp2.yaml" else program
    start("-m", "accelerate.commands.launch", *settings, *program, *words(run, folder))
    found, alone = measured(folder, time.monotonic() - began), measured(run.scratch / "plain", 0.0)
    apart = abs(found["kl"] - alone["kl"]) / alone["kl"]
    return found | {"kl_difference": apart, "allowed": ALLOWED, "ok": apart <= ALLOWED}
