"""A process with the unmodified Hub client that does what a test tells it, against a `HubServer`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer

TOKEN, USER = "hf_writer", "zaphod-beeblebrox"
TESTS = Path(__file__).parent


def environment(server: HubServer, home: Path, **changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    path = os.pathsep.join([os.getcwd(), str(TESTS)])
    fixed = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
             "PYTHONPATH": path, "USER": USER, "LOGNAME": USER, "OMP_NUM_THREADS": "1"}  # fmt: skip
    return kept | fixed | changes


class Worker:
    """One process of `hub_worker.py`."""

    def __init__(self, server: HubServer, home: Path, cwd: Path | None = None, **changes: str) -> None:
        self.typed: list[list[str]] = []  # commands, see test_commands.py
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "hub_worker.py")], cwd=cwd, env=environment(server, home, **changes), **pipes
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def __call__(self, call: str, **arguments) -> dict:
        self.process.stdin.write(json.dumps({"call": call} | arguments) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "crash" not in answer, answer
        return answer

    def push(self, folder: Path, repo_id: str = "me/student", **options) -> dict:
        return self("push", output_dir=str(folder), repo_id=repo_id, **options)

    def run(self, *argv: object, without_token: bool = False) -> tuple[int, str, str]:
        answer = self("cli", argv=[str(word) for word in argv], without_token=without_token)
        return answer["status"], answer["out"], answer["err"]
