"""Python processes that start at once, where a new interpreter would spend seconds on imports.

Each has its own output, arguments, environment and signals. Most are forked from a server that has the package and
the tests; some from one that has imported the libraries only: a process without the package is one of these.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing.util
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser

LIBRARIES = ["torch.distributed.run", "transformers.models.qwen2.modeling_qwen2", "transformers.generation.utils",
             "trl", "trl.trainer.sft_trainer", "datasets", "evaluate", "matplotlib.pyplot", "rich.table"]  # fmt: skip
CLI = "import sys; from hf_layerprune.cli import main; sys.exit(main(sys.argv[1:]))"
TESTS = Path(__file__).parent
SERVERS: dict[str, Server] = {}


class Server:
    """A fork of this process as it is now, which forks the processes that are asked for until this one ends."""

    def __init__(self) -> None:
        incoming, outgoing = os.pipe()
        if os.fork() == 0:
            os.close(outgoing)
            for other in SERVERS.values():
                other.requests.close()
            try:
                self.serve(incoming)
            finally:
                os._exit(0)
        os.close(incoming)
        self.requests = os.fdopen(outgoing, "wb")

    def serve(self, incoming: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch over a process
        with os.fdopen(incoming, "rb") as requests, suppress(EOFError):
            while True:
                folder, *given = pickle.load(requests)
                if os.fork() == 0:
                    requests.close()
                    _watch(Path(folder), *given)


def _watch(folder: Path, *given: object) -> None:
    """Fork the process, and write its number and at last its exit code to files."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = _main(folder, *given)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            with suppress(ValueError):  # what is closed
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _write(folder / "pid", process)
    _write(folder / "exitcode", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)


def _write(path: Path, number: int) -> None:
    with suppress(FileNotFoundError):  # nobody looks at it any more
        path.with_suffix(".new").write_text(str(number))
        path.with_suffix(".new").rename(path)


def _main(folder: Path, code: str | Path, arguments: tuple[str, ...], environment: dict[str, str]) -> int:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, closefd=False))
    for logger in filter(lambda logger: hasattr(logger, "handlers"), logging.root.manager.loggerDict.values()):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:  # others own their stream, and close it
                handler.setStream(sys.stderr)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    try:
        if isinstance(code, Path):
            runpy.run_path(str(code), run_name="__main__")
        else:
            exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
        threading._shutdown()  # wait for threads, as an interpreter does
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        multiprocessing.util._exit_function()  # give semaphores back, as an interpreter does
    return 0


if "hf_layerprune" not in sys.modules:  # else it is not the tests' process; see `conftest.pytest_sessionstart`
    for library in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(library)
    SERVERS["libraries"] = Server()


class Process:
    """What the tests need of `subprocess.Popen`; `server` is "package", or "libraries" without the package."""

    def __init__(
        self, code: str | Path, *arguments: object, environment: Mapping[str, str] = os.environ, server="package"
    ) -> None:
        self.output = tempfile.TemporaryDirectory()
        request = (self.output.name, code, tuple(map(str, arguments)), dict(environment))
        requests = SERVERS[server].requests
        requests.write(pickle.dumps(request))
        requests.flush()

    def read(self, name: str) -> str:
        path = Path(self.output.name, name)
        return path.read_text() if path.exists() else ""

    @property
    def stdout(self) -> str:
        return self.read("stdout")

    @property
    def stderr(self) -> str:
        return self.read("stderr")

    def poll(self) -> int | None:
        code = self.read("exitcode")
        return int(code) if code else None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 600)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.01)
        return self.poll()

    def send_signal(self, number: int) -> None:
        while not self.read("pid"):
            time.sleep(0.01)
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(int(self.read("pid")), number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(code: str | Path, *arguments: object, **options) -> Process:
    """Run a script or code to its end, as `__main__` and with these arguments."""
    process = Process(code, *arguments, **options)
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
    process = run(start + code, server="libraries")
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
