"""The demo as it is started: the command and a copy of the Space, in processes that reach no other host."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("gradio", reason="the demo's extra is not installed")

from gradio_client import Client  # noqa: E402

SPACE = Path(__file__).parent.parent / "space"
OFFLINE = """
import os, socket

HERE = ("localhost", "127.0.0.1", "0.0.0.0", "::1", b"localhost", b"127.0.0.1", None, "")

def guarded(name):
    real = getattr(socket.socket, name)
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in HERE:
            open(os.environ["TOLD"], "a").write(f"{address}\\n")
            raise OSError("no other host")
        return real(self, address)
    setattr(socket.socket, name, connect)

def resolve(host, *arguments, real=socket.getaddrinfo, **options):
    if host not in HERE:
        open(os.environ["TOLD"], "a").write(f"{host}\\n")
        raise OSError("no other host")
    return real(host, *arguments, **options)

guarded("connect"); guarded("connect_ex")
socket.getaddrinfo = resolve
"""


@pytest.fixture
def start(tmp_path):
    """Starts Python in a process whose every look at another host is refused, and written down."""
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    told, processes = tmp_path / "told", []
    root = str(Path(__file__).parent.parent)
    own = {"PYTHONPATH": os.pathsep.join([str(tmp_path), root]), "TOLD": str(told), "PYTHONUNBUFFERED": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "HF_HUB_OFFLINE"))}

    def started(*argv, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([sys.executable, *argv], env=kept | own, **pipes, **options))
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.wait()
    assert not told.exists(), f"other hosts were asked for: {told.read_text()}"


def client_of(process):
    """A client of the demo, as soon as it says where it is served."""
    until, said = time.monotonic() + 120, ""
    while time.monotonic() < until and (line := process.stdout.readline()):
        said += line
        if found := re.search(r"http://[\d.]+:\d+", line):
            return Client(found.group(), verbose=False)
    raise AssertionError(f"it was not served: {said}")


def test_the_speed_benchmark_has_a_verdict():
    path = SPACE.parent / "benchmarks" / "demo_speed.py"
    spec = importlib.util.spec_from_file_location("demo_speed", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    close = script.compared({"benchmark": [100.0, 50.0, 10.0], "greedy": [90.0, 50.0, 30.0]})
    assert close["greedy"] == {"tokens_per_second": 50.0, "ratio": 1.0}
    far = script.compared({"benchmark": [100.0], "greedy": [80.0]})
    assert script.verdict({"original": close, "compressed": close})["agrees"]
    found = script.verdict({"original": close, "compressed": far})
    assert not found["agrees"] and found["summary"].startswith("DISAGREES: at most 20.0% apart (compressed, greedy)")


def test_the_command_and_a_copied_space_are_served_and_ask_nothing_of_other_hosts(start, tmp_path, demo_folder):
    """The Space shows a run on this machine in place of the one on the Hub."""
    shutil.copytree(SPACE, tmp_path / "space")
    listed = tmp_path / "space" / "models.yaml"
    settings = yaml.safe_load(listed.read_text())
    settings["models"][0] |= {"run": str(demo_folder / "text" / "run"), "teacher": None}
    listed.write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = start("-m", "hf_layerprune.cli", "demo", "--server_port", str(port))
    space = start("app.py", cwd=tmp_path / "space")
    for process, page in ((command, SPACE / "README.md"), (space, SPACE.parent / "docs" / "space.md")):
        client = client_of(process)
        (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        code = re.sub(r'Client\("user/[\w-]+"\)', "client", code).replace("max_new_tokens=64, ", "")
        exec(code.replace("api_name=", "max_new_tokens=4, api_name="), {"client": client})
