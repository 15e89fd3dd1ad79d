"""The page as programs see it: one endpoint, limits on the server, twenty visitors at once, each to himself."""

import concurrent.futures
import json
import re
import urllib.request
from pathlib import Path

import forked
import pytest
from demo_models import make_service

gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed")

from gradio_client import Client  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from hf_layerprune import cli  # noqa: E402
from hf_layerprune.demo.generation import Position  # noqa: E402
from hf_layerprune.demo.page import build_page, labels_of, launch_page  # noqa: E402

RUN = "tiny run"


@pytest.fixture(scope="module")
def url(demo_folder):
    service = make_service(demo_folder, max_waiting=30, max_prompt_tokens=300)
    page = build_page(service)
    _, url, _ = launch_page(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    page.close()


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def test_there_is_one_named_endpoint(client):
    api = client.view_api(return_format="dict")
    assert list(api["named_endpoints"]) == ["/compare"] and not api["unnamed_endpoints"]
    names = [parameter["parameter_name"] for parameter in api["named_endpoints"]["/compare"]["parameters"]]
    assert names[:5] == ["prompt", "model", "depth", "chat", "max_new_tokens"]


def test_compare_streams_and_ends_with_both_answers(client):
    job = client.submit("It was", RUN, 4, max_new_tokens=24, api_name="/compare")
    result = job.result(timeout=60)
    assert result["ended"] and result["compressed"]["num_layers"] == 4
    assert result["original"]["num_tokens"] == result["compressed"]["num_tokens"] == 24
    assert "4 layers instead of 6" in result["summary"]
    assert result["original"]["ending"] == "length"
    assert len(job.outputs()) >= 2 and not job.outputs()[0]["ended"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": "x" * 100_000}, "100,000 characters"),
        ({"prompt": "word " * 200}, "tokens; 1 to 300"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": "user/other"}, "not on the list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_hold_on_the_server(client, changes, told):
    with pytest.raises(AppError, match=told) as error:
        client.predict(**{"prompt": "a", "model": RUN} | changes, api_name="/compare")
    assert "Traceback" not in str(error.value)


def test_twenty_visitors_at_once_are_served_in_turn_and_see_their_own_words_alone(url):
    """With no luck in the draw, an answer depends on its prompt alone: it must be what the prompt gives by itself."""
    prompts = [f"visitor {number} said" for number in range(20)]
    options = {"model": RUN, "max_new_tokens": 8, "temperature": 0, "api_name": "/compare"}
    alone = Client(url, verbose=False)
    wanted = [alone.predict(prompt, **options) for prompt in prompts]

    def ask(prompt):
        return Client(url, verbose=False).predict(prompt, **options)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, prompts))
    for name in ("original", "compressed"):
        assert [answer[name]["text"] for answer in answers] == [answer[name]["text"] for answer in wanted]
        assert all(answer["ended"] and answer[name]["num_tokens"] == 8 for answer in answers)
    assert len({answer["original"]["text"] for answer in answers}) > 10


def test_more_than_may_wait_are_told_so(demo_folder):
    page = build_page(make_service(demo_folder, max_waiting=1))
    _, url, _ = launch_page(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        clients = [Client(url, verbose=False) for _ in range(6)]
        options = {"model": RUN, "max_new_tokens": 150, "api_name": "/compare"}
        jobs = [client.submit("a", **options) for client in clients]
        errors = [str(job.exception(timeout=120)) for job in jobs]
        assert any("visitors are waiting already" in error for error in errors)
        assert "None" in errors
    finally:
        page.close()


def test_the_package_and_the_command_line_work_without_gradio():
    code = """
import sys
sys.modules["gradio"] = None
import hf_layerprune, hf_layerprune.demo, hf_layerprune.cli.demo, hf_layerprune.demo.space
"""
    process = forked.run(code, server="libraries")
    assert process.wait() == 0, process.stderr


def test_a_port_that_is_taken_is_one_line(url, capsys):
    assert cli.main(["demo", "--server_port", url.strip("/").rpartition(":")[2]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"hf-layerprune: port \d+ is in use; choose another, or none for the first free one", error)


def test_no_probability_is_lost_where_tokens_look_alike():
    position = Position("a", 0.1, (("\ufffd", 0.5), ("b", 0.3), ("\ufffd", 0.2)), ((" ", 0.6), ("\u2423", 0.3)))
    for label, expected in zip(labels_of(position), (position.original, position.compressed), strict=True):
        assert list(label.values()) == [share for _, share in expected]
    assert {name.strip("\u200b") for name in labels_of(position)[0]} == {"\ufffd", "b"}


def test_other_errors_show_no_details(demo_folder):
    service = make_service(demo_folder)
    service.store.get = lambda source: Path("/secret/place").read_text()
    page = build_page(service)
    _, url, _ = launch_page(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with pytest.raises(AppError) as error:
            Client(url, verbose=False).predict("a", RUN, api_name="/compare")
        assert "secret" not in str(error.value)
    finally:
        page.close()


def test_the_one_tool_of_mcp_is_compare(url):
    pytest.importorskip("mcp", reason="Gradio's extra for MCP is not installed")
    with urllib.request.urlopen(f"{url}gradio_api/mcp/schema") as answer:
        (tool,) = json.load(answer)
    assert tool["name"] == "compare" and tool["description"].startswith("Let a language model and a compressed copy")
    assert {"prompt", "model", "depth", "chat", "seed"} <= set(tool["inputSchema"]["properties"])


def test_the_page_names_no_other_host(client):
    config = json.dumps(client.config)
    assert "googleapis" not in config and "gstatic" not in config


def test_the_command_says_what_it_loads_and_where_the_page_is(monkeypatch, capsys):
    def launched(app, **options):
        app.local_url, app.share_url = "http://127.0.0.1:7860/", None
        seen.update(options)

    seen = {}
    monkeypatch.setattr("hf_layerprune.demo.page.launch_page", launched)
    monkeypatch.setattr("hf_layerprune.demo.service.DemoService.warm_up", lambda service: None)
    assert cli.main(["demo", "--share"]) == 0
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "loading embedded and embedded in 10 layers, and answering an example ..."
    assert "shared links cannot be reached" in second
    assert third == "the demo is at http://127.0.0.1:7860/ until you press Ctrl-C"
    assert seen["share"] and seen["server_name"] == "127.0.0.1"
