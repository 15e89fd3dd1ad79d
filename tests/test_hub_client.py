"""What the client's errors become, and what a run's folder no longer holds."""

import json
import sys

import pytest
from conftest import tiny_model
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from test_report import ROUNDS, TEACHER

from hf_layerprune import LayerPruneError
from hf_layerprune.hub import RunFolder
from hf_layerprune.hub.client import READING, TRANSPORT_ERROR, patiently
from hf_layerprune.report import write_report

http = sys.modules[TRANSPORT_ERROR.__module__.partition(".")[0]]


def answer(status, message=None):
    request = http.Request("GET", "https://hub")
    return HfHubHTTPError("x", response=http.Response(status, request=request), server_message=message)


def test_a_message_of_several_lines_is_one():
    def call():
        raise answer(400, "one\n  two\nthree")

    with pytest.raises(LayerPruneError, match="^asking: the Hub answered 400: one two three$"):
        patiently("asking", call)


@pytest.mark.parametrize("status, purpose, message", [(403, {}, "write access"), (403, {"purpose": READING}, "read")])
def test_what_a_token_needs_depends_on_the_purpose(status, purpose, message):
    def call():
        raise answer(status)

    with pytest.raises(LayerPruneError, match=message):
        patiently("asking", call, **purpose)


def test_a_file_that_was_never_read_while_the_hub_is_out_of_reach():
    def call():
        raise LocalEntryNotFoundError("not in the cache")

    with pytest.raises(LayerPruneError, match="the Hub is out of reach and the file was not read before; try again"):
        patiently("asking", call, purpose=READING)


def test_parallelize_keeps_the_last_student_alone(tmp_path):
    write_report(tmp_path, TEACHER, ROUNDS, {"search": "greedy"})
    tiny_model(2).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"layer_plan": ROUNDS[1]["plan"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run = RunFolder.open(tmp_path)
    assert run.student(2) == tmp_path / "model"
    with pytest.raises(LayerPruneError, match="never held the student of round 1: parallelize keeps only the last"):
        run.student(1)
