"""Python processes that start at once, where a new interpreter would spend seconds on imports.

They are forked from a server that has imported the libraries, but not `hf_layerprune`: a process without the package
is one of these too. Each has its own output, arguments, environment and signals.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["torch.distributed.run", "transformers.models.qwen2.modeling_qwen2", "transformers.generation.utils", "trl",
     "trl.trainer.sft_trainer", "datasets", "evaluate", "matplotlib.pyplot", "rich.table"]
)  # fmt: skip
CLI = "import sys; from hf_layerprune.cli import main; sys.exit(main(sys.argv[1:]))"
TESTS = Path(__file__).parent


def _main(code: str | Path, arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    if isinstance(code, Path):
        runpy.run_path(str(code), run_name="__main__")
    else:
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})


class Process:
    """What the tests need of `subprocess.Popen`."""

    def __init__(self, code: str | Path, *arguments: object, environment: Mapping[str, str] = os.environ) -> None:
        self.output = tempfile.TemporaryDirectory()
        given = (code, tuple(map(str, arguments)), dict(environment), self.output.name)
        self.process = FORKED.Process(target=_main, args=given)
        self.process.start()

    @property
    def stdout(self) -> str:
        return Path(self.output.name, "stdout").read_text()

    @property
    def stderr(self) -> str:
        return Path(self.output.name, "stderr").read_text()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(code: str | Path, *arguments: object, environment: Mapping[str, str] = os.environ) -> Process:
    """Run a script or code to its end, as `__main__` and with these arguments."""
    process = Process(code, *arguments, environment=environment)
    try:
        process.wait(300)
    finally:
        process.kill()
    return process


def run_without_package(code: str, modules: Path) -> None:
    """Run code where `hf_layerprune` cannot be imported; code of checkpoints is copied to the folder `modules`."""
    start = f"""
import sys
assert "hf_layerprune" not in sys.modules
sys.modules["hf_layerprune"] = None
from transformers import dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = {str(modules)!r}
"""
    process = run(start + code)
    assert process.wait() == 0, process.stderr


def run_ranks(count: int, code: str | Path, *arguments: object) -> None:
    """Run a script or code in processes that find each other, as torchrun starts them; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Process(code, *arguments, environment=environment))
    until = time.monotonic() + 300
    try:
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    failed = [process.stderr[-3000:] for process in processes if process.wait(10)]
    assert not failed, "\n".join(failed)


def accelerate_launch(*words: object) -> None:
    """`accelerate launch`, whose processes are forked instead of started by torchrun."""

    def fork(options) -> None:
        start = f"import runpy; runpy.run_module({options.training_script!r}, run_name='__main__')"
        code = start if options.module else Path(options.training_script)
        run_ranks(int(options.nproc_per_node), code, *options.training_script_args)

    with mock.patch("torch.distributed.run.run", fork):
        launch_command(launch_command_parser().parse_args([str(word) for word in words]))
