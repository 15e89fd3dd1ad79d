"""Files that travel in parts arrive whole, or not at all."""

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "carry.py"


@pytest.fixture(scope="module")
def carry():
    spec = importlib.util.spec_from_file_location("carry", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """A file of more than two parts, and a folder."""
    folder = tmp_path / "wheels"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.whl").write_bytes(b"a" * 5)
    (folder / "inner" / "empty").write_bytes(b"")
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(range(256)) * 10_000)
    return [model, folder]


def test_parts_travel_over_a_network_and_arrive_whole(carry, files, tmp_path):
    manifest = carry.split(files, tmp_path / "parts", 2**20)
    assert len(manifest["parts"]) == 3 and all(part["bytes"] <= 2**20 for part in manifest["parts"])
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "parts"))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("manifest.json", *(part["name"] for part in manifest["parts"])):
            with urlopen(f"http://127.0.0.1:{server.server_port}/{name}") as answer:
                (arrived / name).write_bytes(answer.read())
        server.shutdown()
    assert carry.join(arrived, tmp_path / "there") == []
    assert (tmp_path / "there" / "model.gguf").read_bytes() == files[0].read_bytes()
    assert (tmp_path / "there" / "wheels" / "a.whl").read_bytes() == b"aaaaa"
    assert (tmp_path / "there" / "wheels" / "inner" / "empty").read_bytes() == b""


def test_the_same_files_make_the_same_parts(carry, files, tmp_path):
    first = carry.split(files, tmp_path / "first", 2**20)
    files[0].touch()
    assert carry.split(files, tmp_path / "second", 2**20) == first
    fewer = carry.split(files, tmp_path / "second", 2**22)  # of the earlier parts none is left
    assert sorted(path.name for path in (tmp_path / "second").glob("part-*")) == [p["name"] for p in fewer["parts"]]


def test_what_is_missing_or_damaged_is_named_and_nothing_is_written(carry, files, tmp_path, capsys):
    parts, there = tmp_path / "parts", tmp_path / "there"
    carry.split(files, parts, 2**20)
    (parts / "part-002").unlink()
    (parts / "part-003").write_bytes(b"x" * (parts / "part-003").stat().st_size)
    with pytest.raises(SystemExit) as caught:
        carry.main(["join", str(parts), "--output", str(there)])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["part-002 has not arrived", "part-003 is damaged; send it again"]
    assert not there.exists() and not there.with_name("there.part").exists()


def test_a_file_that_is_not_what_was_sent_is_named(carry, files, tmp_path):
    parts = tmp_path / "parts"
    carry.split(files, parts, 2**20)
    manifest = json.loads((parts / "manifest.json").read_text())
    manifest["files"]["model.gguf"]["sha256"] = "0" * 64
    (parts / "manifest.json").write_text(json.dumps(manifest))
    (wrong,) = carry.join(parts, tmp_path / "there")
    assert wrong.startswith("model.gguf is not what was sent") and not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["split", "nothing.gguf", "--output", "parts"], "does not exist"),
        (["split", "{0}", "--output", "parts", "--part_mib", "61"], "choose 1 to 60"),
        (["split", "{0}", "{0}", "--output", "parts"], "rename one"),
        (["join", "{1}", "--output", "there"], "has no manifest.json"),
        (["join", "{1}", "--output", "{1}"], "choose another folder"),
    ],
)
def test_mistakes_are_one_line(carry, files, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        carry.main([word.format(*files) for word in arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_python_alone_joins(carry, files, tmp_path):
    carry.split(files, tmp_path / "parts", 2**20)
    script = Path(shutil.copy(SCRIPT, tmp_path))
    command = [sys.executable, "-I", "-S", script, "join", tmp_path / "parts", "--output", tmp_path / "there"]
    subprocess.run(command, check=True)
    assert (tmp_path / "there" / "model.gguf").stat().st_size == files[0].stat().st_size
