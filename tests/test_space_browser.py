"""The demo in a real browser: type, compare, stop, choose a depth, look inside, on a desk and on a phone.

It needs Playwright (in the `dev` extra) and a Chromium (`apt-get install chromium`; `make test` tries to).
"""

import os
import re
import shutil
import time
import warnings
from dataclasses import replace

import pytest
from demo_browser import CONTRAST, SIDES, TEACHER, WATCH, ask, facts, set_sampling, words
from demo_models import make_service

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>${window.hacked=1}{{window.hacked}}\x07"


def skip_loudly(reason):
    warnings.warn(f"THE BROWSER TESTS OF THE DEMO ARE SKIPPED: {reason}", stacklevel=2)
    pytest.skip(reason, allow_module_level=True)


CHROMIUM = next(filter(None, map(shutil.which, EXECUTABLES)), None)
if CHROMIUM is None:
    skip_loudly("no Chromium; install it with: apt-get install chromium")
try:
    import gradio  # noqa: F401
    from playwright.sync_api import expect, sync_playwright
except ImportError as missing:
    skip_loudly(f"{missing.name} is not installed; install it with: pip install -e '.[dev]'")

from hf_layerprune.demo import DemoService, generation  # noqa: E402
from hf_layerprune.demo.page import build_page, launch_page  # noqa: E402

SECONDS = 1000
PATIENCE = 90 * SECONDS  # a page may wait long for a core that others use
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def service(demo_folder):
    service = make_service(demo_folder, max_new_tokens=1000, max_prompt_tokens=3000)
    service.warm_up()
    return service


@pytest.fixture(scope="module")
def url(service):
    yield from serve(service)


@pytest.fixture(scope="module")
def crowded(service):
    """The same models, with room for one visitor in the queue."""
    limits = replace(service.limits, max_waiting=1)
    other = DemoService(replace(service.settings, limits=limits), service.catalog)
    other.store = service.store
    yield from serve(other)


def serve(service):
    page = build_page(service)
    _, url, _ = launch_page(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url
    page.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url):
    """Opens the page; at the end there was no error on the console, and no request to any other host."""
    problems, contexts = [], []

    def opened(width=1280, height=900, theme="light", url=url, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on(
            "console",
            lambda message: message.type == "error" and problems.append(f"{message.text} {message.location['url']}"),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _foreign(request.url, url) and problems.append(request.url))
        page.goto(f"{url}?__theme={theme}")
        expect(page.locator("#lp-run")).to_be_visible()
        return page

    opened.problems = problems
    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def unhurried(monkeypatch):
    """Models that write at most 50 tokens a second, so that there is time to act while they do."""
    sample = generation.sample

    def slowly(*args):
        for token in sample(*args):
            time.sleep(0.02)
            yield token

    monkeypatch.setattr(generation, "sample", slowly)


def _foreign(address, url):
    return not address.startswith((url, "data:", "blob:", url.replace("http", "ws")))


def finished(page, prompt=TEACHER):
    """Wait for both answers to a prompt."""
    expect(page.locator(SIDES[1])).to_contain_text(prompt)  # with it the facts of the last comparison go
    expect(page.locator("#lp-status")).to_contain_text(re.compile("answers part|same answer|same words"))


def stop(page):
    """Press Stop, and wait until the page takes another prompt: when the server has cancelled what ran."""
    with page.expect_response("**/cancel"):
        page.click("#lp-stop")


def choose(page, name):
    page.click("#lp-model input")
    page.get_by_role("option", name=name).click()
    expect(page.locator("#lp-headline")).to_contain_text(name)  # what follows the choice is there
    page.wait_for_timeout(SECONDS)  # and drawn


def test_the_first_view_explains_itself(visit):
    """Names, numbers and an answered example are there before anything is done."""
    page = visit()
    expect(page.locator("#lp-headline")).to_contain_text("embedded against embedded in 10 layers")
    assert words(page, 0).startswith(TEACHER) and len(words(page, 1)) > len(TEACHER) + 10
    assert page.locator("mark").count() == 2 and "layers instead of 16" in page.inner_text("#lp-status")
    assert page.title() and page.locator("meta[name=description]").last.get_attribute("content")


def test_both_models_stream_and_are_measured(visit):
    page = visit()
    set_sampling(page, "max_new_tokens", 100)
    page.evaluate(WATCH)
    ask(page, "It was late")
    finished(page, "It was late")
    grown = page.evaluate("() => Object.values(window.lengths).map(lengths => lengths.size)")
    assert len(grown) == 2 and min(grown) > 3, grown
    for side, layers in ((0, "16 layers"), (1, "10 layers")):
        assert list(facts(page, side)) == ["tokens/s", "first token", "tokens", "weights and KV cache"]
        expect(page.locator(SIDES[side])).to_contain_text(layers)
        expect(page.locator(SIDES[side])).to_contain_text("cut at 100 tokens")
    assert page.locator("mark").count() == 2  # the first different word of each


def test_stop_works_and_a_refusal_leaves_the_answers(visit, unhurried):
    page = visit()
    set_sampling(page, "max_new_tokens", 1000)
    ask(page, "It was early")
    expect(page.locator("#lp-status")).to_contain_text("in turn")  # it writes
    stop(page)
    expect(page.locator(SIDES[0])).to_contain_text("stopped after")
    before = words(page, 0)
    page.fill("#lp-prompt textarea", "")
    page.click("#lp-run")
    expect(page.locator("#lp-status [role=alert]")).to_contain_text("The prompt is empty")
    assert words(page, 0) == before
    set_sampling(page, "max_new_tokens", 12)
    ask(page, "It was late")
    finished(page, "It was late")
    assert facts(page, 0)["tokens"] == facts(page, 1)["tokens"] == "12"


def test_a_full_line_is_reported_and_stop_takes_back_who_waits(visit, crowded, unhurried):
    first, second, third = (visit(url=crowded) for _ in range(3))
    set_sampling(first, "max_new_tokens", 1000)
    ask(first, "Asked first")
    expect(first.locator("#lp-status")).to_contain_text("in turn")
    ask(second, "Never asked")
    expect(second.locator("#lp-status")).to_contain_text("1 visitor ahead, about")
    ask(third, "Too many")  # there is room for one
    expect(third.locator("#lp-status")).to_contain_text("1 visitors are waiting already")
    stop(second)
    expect(second.locator(SIDES[0])).to_contain_text("not run")
    stop(first)
    set_sampling(second, "max_new_tokens", 12)
    ask(second, "Asked instead")
    finished(second, "Asked instead")


def test_by_keyboard_alone(visit):
    page = visit()
    expect(page.get_by_text("Enter sends")).to_be_visible()
    page.locator("#lp-prompt textarea").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("It was")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a night")
    set_value = page.locator("#lp-prompt textarea").input_value()
    assert set_value == "It was\na night"
    page.keyboard.press("Enter")
    finished(page, "a night")


def test_an_example_is_asked_with_a_click(visit):
    page = visit()
    set_sampling(page, "max_new_tokens", 12)
    page.get_by_text("It was a dark and stormy night;").click()
    finished(page, "It was a dark and stormy night;")
    expect(page.locator("#lp-prompt textarea")).to_have_value("It was a dark and stormy night;")


def test_another_depth_asks_the_student_alone(visit):
    page = visit()
    choose(page, "tiny run")
    expect(page.locator("#lp-depth input:checked")).to_have_value("3")
    set_sampling(page, "max_new_tokens", 24)
    ask(page, "It was")
    finished(page, "It was")
    original = words(page, 0)
    page.locator("#lp-depth input[value='5']").check()
    expect(page.locator(SIDES[1])).to_contain_text("5 layers")
    page.wait_for_timeout(SECONDS)
    finished(page, "It was")
    assert words(page, 0) == original and facts(page, 1)["tokens"] == "24"
    page.get_by_role("tab", name="Look inside").click()
    expect(page.locator("#lp-layers")).to_contain_text("6 layers of the original became 5")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("6, the original").check()
    expect(page.locator("#lp-status")).to_contain_text("Both gave the same answer")
    assert words(page, 0) == words(page, 1) == original


@pytest.mark.parametrize("both_answered", [True, False])
def test_the_last_of_two_depths_is_asked_while_the_first_still_writes(visit, unhurried, both_answered):
    page = visit()
    choose(page, "tiny chat")
    set_sampling(page, "max_new_tokens", 50)
    ask(page, "Hello")
    finished(page, "Hello")
    ask(page, "And then?")
    expect(page.locator("#lp-status")).to_contain_text("in turn")
    if both_answered:
        finished(page, "And then?")
    for depth in (5, 4):
        page.locator(f"#lp-depth input[value='{depth}']").check()
        expect(page.locator(SIDES[1])).to_contain_text(f"{depth} layers")
        expect(page.locator("#lp-status")).to_contain_text("in turn")
        page.wait_for_timeout(SECONDS)
    finished(page, "And then?")
    expect(page.locator(SIDES[1])).to_contain_text("4 layers")
    assert facts(page, 0)["tokens"] == facts(page, 1)["tokens"] == "50"
    assert all("Hello" in words(page, side) for side in (0, 1))


def test_what_is_inside_and_what_comes_next(visit):
    page = visit()
    page.get_by_role("tab", name="Look inside").click()
    expect(page.locator("#lp-layers")).to_contain_text("in parallel, as one layer")
    plots = page.locator("#lp-map img, #lp-quality img").filter(visible=True)
    expect(plots).to_have_count(0)  # without a run there is nothing to draw
    choose(page, "tiny run")
    expect(plots).to_have_count(2)
    expect(page.locator("#lp-positions")).to_have_count(0)  # nothing before it was asked for
    page.fill("#lp-text textarea", "It was a night")
    page.click("#lp-inspect")
    tokens = page.locator("#lp-positions .token")
    expect(tokens).to_have_count(14)
    expect(page.locator("#lp-positions")).to_contain_text(re.compile(r"full red is \d\.\d\d or more"))
    expect(page.locator("#lp-distance")).to_contain_text("0 = identical")
    expected = page.get_by_test_id("label-output-value")
    expect(expected).to_have_count(2)
    shares = expected.first.locator("xpath=ancestor::div[contains(@class, 'block')][1]")
    before = shares.inner_text()
    tokens.nth(2).click()
    expect(shares).not_to_have_text(before)


def test_hostile_words_are_text(visit):
    page = visit()
    choose(page, "tiny run")
    set_sampling(page, "max_new_tokens", 12)
    ask(page, HOSTILE)
    finished(page, "onerror")
    assert HOSTILE.rstrip("\x07") in words(page, 0)
    page.get_by_role("tab", name="Look inside").click()
    page.fill("#lp-text textarea", HOSTILE)
    page.click("#lp-inspect")
    expect(page.locator("#lp-positions .token").first).to_be_visible()
    assert page.evaluate("window.hacked") is None and page.locator("#lp-answers img").count() == 0


def test_a_chat_goes_on_and_begins_again(visit):
    page = visit()
    choose(page, "tiny chat")
    set_sampling(page, "max_new_tokens", 12)
    for message in ("Hello", "And then?"):
        ask(page, message)
        expect(page.locator("#lp-prompt textarea")).to_have_value("")
        finished(page, message)
    assert "Hello" in words(page, 0) and "Hello" in words(page, 1)
    before = words(page, 0)
    page.click("#lp-again")
    page.wait_for_timeout(SECONDS)
    expect(page.locator(f"{SIDES[0]} .lp-words")).not_to_have_text(before)
    finished(page, "And then?")
    assert words(page, 0).count("And then?") == 1
    set_sampling(page, "temperature", 0)
    for seed in (page.locator("#lp-again"), page.locator("#lp-sampling").get_by_text("Seed", exact=True)):
        expect(seed).not_to_be_visible()  # it means nothing now
    page.click("#lp-new")
    for side in SIDES:
        expect(page.locator(side)).not_to_contain_text("Hello")
    page.get_by_text("Continue a text").click()
    expect(page.get_by_text("It was a dark and stormy night;")).to_be_visible()
    page.wait_for_timeout(SECONDS)
    ask(page, "It was")
    finished(page, "It was")
    expect(page.locator("#lp-prompt textarea")).to_have_value("It was")


def test_a_link_brings_the_prompt_and_the_settings_back(visit):
    page = visit()
    choose(page, "tiny run")
    set_sampling(page, "max_new_tokens", 12)
    page.locator("#lp-depth input[value='4']").check()
    expect(page.locator(SIDES[1])).to_contain_text("4 layers")
    ask(page, "It was & is")
    finished(page, "It was & is")
    page.get_by_text("Link to this comparison").click()
    expect(page.locator("#lp-prompt textarea")).to_have_value("It was & is")
    expect(page.locator("#lp-depth input:checked")).to_have_value("4")
    page.click("#lp-run")
    finished(page, "It was & is")
    assert facts(page, 1)["tokens"] == "12"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_words_can_be_read(visit, theme):
    """Contrast of at least 4.5 to 1 between words and what is behind them."""
    page = visit(390, 844, theme, is_mobile=True, has_touch=True)
    set_sampling(page, "max_new_tokens", 12)
    ask(page, "word" * 300)
    finished(page, "word")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_text("Enter sends").filter(visible=True).count() == 0  # there are no such keys
    boxes = [page.locator(side).bounding_box() for side in SIDES]
    choices = [page.locator(choice).bounding_box() for choice in ("#lp-model", "#lp-depth")]
    assert choices[1]["y"] >= choices[0]["y"] + choices[0]["height"]
    assert page.locator("h1").bounding_box()["height"] < 80  # two lines
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"] and all(box["width"] > 300 for box in boxes)
    for part in (
        "#lp-run", "[role=tab][aria-selected=true]", "#lp-status p", ".lp-tile p", ".lp-good strong", ".lp-card dt",
        ".lp-you", "mark", "footer a, footer button",
    ):  # fmt: skip
        for element in page.locator(part).all():
            contrast = element.evaluate(CONTRAST)
            assert contrast >= 4.5, f"{part}: {contrast:.1f}"
    page.get_by_role("tab", name="Look inside").click()
    page.click("#lp-inspect")
    expect(page.locator("#lp-positions .token").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_by_text("Enter sends").filter(visible=True).count() == 0


def test_answers_can_be_copied_and_the_page_has_an_icon(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    page.click("#lp-copy")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "\n\n".join(
        f"{name}:\n{words(page, side)}" for side, name in enumerate(("Original", "Compressed"))
    )
    assert "<svg" in page.request.get(f"{page.url.partition('?')[0]}favicon.ico").text()


def test_the_page_is_as_wide_before_the_answers_as_after(visit):
    page = visit(1920, 1000)
    before = page.locator("#lp-answers").bounding_box()["width"]
    set_sampling(page, "max_new_tokens", 12)
    ask(page, "It was")
    finished(page, "It was")
    assert page.locator("#lp-answers").bounding_box()["width"] == before > 1250


def test_two_visitors_do_not_see_each_other(visit):
    first, second = visit(), visit()
    ask(first, "The first visitor")
    ask(second, "The second visitor")
    finished(first, "The first visitor")
    finished(second, "The second visitor")
    assert words(first, 0).startswith("The first visitor") and words(second, 0).startswith("The second visitor")
