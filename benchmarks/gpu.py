"""What only a GPU can tell, in a quarter of an hour: sections that stand alone, each with a JSON file of its own.

    python benchmarks/gpu.py --suite quick --output runs/gpu                  # nine minutes at most
    python benchmarks/gpu.py --suite full --output runs/gpu                   # every shape: 45 minutes
    python benchmarks/gpu.py --sections decode memory --output runs/gpu       # some of it
    python benchmarks/gpu.py --device cpu --tiny --output /tmp/tiny           # does the script work? without a GPU

The file of a section is written again after every case, so what has been measured is kept, whatever happens later. A
case that fails or takes too long is recorded as such, and the next one runs. Time that a section does not need goes to
the next. A section that needs a package that is not installed says so. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUICK_SECONDS = {
    "correctness": 80, "decode": 185, "healing_step": 85, "scoring_cost": 45, "memory": 45, "engines": 70,
}  # fmt: skip
"""Seconds of each section of `--suite quick`, 510 in all; imports and the ends of cases take the rest of nine minutes.
`full` allows `FULL_TIMES` as much."""
FULL_TIMES = 5
LEAST_SECONDS = 1.0
"""A case that has less time left is not begun."""
PACKAGES = ("torch", "triton", "transformers", "trl", "datasets", "accelerate", "peft", "liger-kernel")


class OutOfTime(BaseException):
    """Ends a case whose section has no time left; no library catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise [`OutOfTime`] after some time; a timer that ran before goes on afterwards."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - start)) if left else 0)
        signal.signal(signal.SIGALRM, before)


def outcome(measure: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """What a case found, or why it found nothing."""
    start = time.monotonic()
    if deadline - start < LEAST_SECONDS:
        return {"skipped": "the section had no time left"}
    try:
        with time_limit(deadline - start):
            found = {"result": measure()}
    except OutOfTime:
        found = {"error": f"stopped after {deadline - start:.0f} s, the time its section had left"}
    except ModuleNotFoundError as error:
        found = {"missing": str(error)}
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        found = {"error": f"{type(error).__name__}: {error}", "traceback": lines[-12:]}
    return found | {"seconds": round(time.monotonic() - start, 2)}


def run_section(name: str, run: Any, deadline: float, path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Measure every case of a section; its file is written again after each."""
    from gpu_sections.common import release

    from hf_layerprune.files import to_json, write_atomically

    record: dict[str, Any] = about | {"section": name, "cases": {}}
    try:
        cases = importlib.import_module(f"gpu_sections.{name}").cases(run)
    except ModuleNotFoundError as error:
        cases, record["missing"] = [], str(error)
    except Exception as error:
        cases, record["error"] = [], f"{type(error).__name__}: {error}"
    write_atomically(path, to_json(record))
    for case, measure in cases:
        record["cases"][case] = found = outcome(measure, deadline)
        write_atomically(path, to_json(record))
        print(f"{name}: {case}: {shown(found)}", flush=True)
        release()
    return record


def is_lost(device: Any) -> bool:
    """Whether a case has left the GPU in a state in which this process cannot use it any more."""
    import torch

    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def start_again(arguments: argparse.Namespace, sections: list[str], seconds: float, failed: list[str]) -> None:
    """Become a new process, which has the GPU as it should be, for the sections that are left."""
    words = ["--suite", arguments.suite, "--output", arguments.output, "--device", arguments.device]
    words += ["--tiny"] * arguments.tiny + ["--seconds", seconds, "--failed", *failed, "--sections", *sections]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(HERE / "gpu.py"), *map(str, words)])


def failures(record: dict[str, Any]) -> Iterator[str]:
    """The cases of a section that failed, or whose results are not what they should be."""
    if "error" in record:
        yield record["section"]
    for case, found in record["cases"].items():
        if "error" in found or '"ok": false' in json.dumps(found):
            yield f"{record['section']}: {case}"


def shown(found: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in found.items() if key != "traceback"})
    return text if len(text) < 600 else text[:600] + " ..."


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """The hardware, versions and settings that numbers were measured with."""
    import torch

    from hf_layerprune.environment import hardware

    device, versions = torch.device(arguments.device), {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found = {"hardware": hardware(device), "python": platform.python_version()} | versions
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {"environment": found, "suite": arguments.suite, "tiny": arguments.tiny}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("quick", "full"), default="quick")
    parser.add_argument("--output", type=Path, required=True, help="folder for SECTION.json")
    parser.add_argument("--sections", nargs="+", choices=QUICK_SECONDS, default=list(QUICK_SECONDS), metavar="NAME",
                        help=f"of {', '.join(QUICK_SECONDS)}; all by default")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of nothing, to prove the script")
    parser.add_argument("--seconds", type=float, help="for all sections together; the suite's by default")
    parser.add_argument("--failed", nargs="*", default=[], help=argparse.SUPPRESS)  # before it started again
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path[:0] = map(str, (HERE, HERE.parent, HERE.parent / "tests"))  # other benchmarks, the package, references
    import torch
    from gpu_sections.common import Run

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here; --device cpu --tiny proves the script without one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    shares = {name: QUICK_SECONDS[name] for name in arguments.sections}
    times = (FULL_TIMES if arguments.suite == "full" else 1) if arguments.seconds is None else 0
    scale = times or arguments.seconds / sum(shares.values())
    deadline, failed, left = time.monotonic(), list(arguments.failed), list(shares)
    end = deadline + scale * sum(shares.values())
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(torch.device(arguments.device), arguments.tiny, arguments.suite == "full", Path(scratch))
        for name, share in shares.items():
            deadline += share * scale
            record = run_section(name, run, deadline, arguments.output / f"{name}.json", about(arguments))
            failed += failures(record)
            left.remove(name)
            if left and is_lost(run.device):
                break
    if left:
        print(f"{name} has left the GPU unusable; the other sections run in a new process", flush=True)
        start_again(arguments, left, max(1.0, end - time.monotonic()), failed)
    print("\n".join([f"results: {arguments.output}", *(f"failed: {case}" for case in failed)]))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
