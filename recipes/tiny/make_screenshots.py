"""The screenshots of docs/space.md: the demo of finished runs, in a real browser.

    python recipes/tiny/make_screenshots.py REMOVED PARALLEL

The first run is in most pictures, a second one in those of layers in parallel; without it they are left out. The demo
is launched as `hf-layerprune demo` launches it. Needs Playwright and a Chromium that is installed already.

Run it on a quiet machine: the pictures show speeds. A picture is taken again while its ratio of speeds is more than
15 % from the median of several comparisons, and after some attempts that is an error.
"""

from __future__ import annotations

import io
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hf_layerprune.data import EMBEDDED_MODEL
from hf_layerprune.demo import DemoSettings, ModelEntry, launch
from hf_layerprune.loading import load_tokenizer

FOLDER = Path(__file__).parent.parent.parent / "docs" / "images"
PROMPT = "The old man looked out of the window and"
ABOUT = "A small English model that was trained on old books, and shallower copies of it."
MESSAGES = ("Where have you been all day?", "And whom did you meet there?")
IN_CONVERSATION = "The same models, which take turns as the people in a book do."
DIALOGUE = (
    "{% for message in messages %}\u201c{{ message.content }}\u201d\n\n{% endfor %}"
    "{% if add_generation_prompt %}\u201c{% endif %}"
)
TOLERANCE, ATTEMPTS = 0.15, 6


def main() -> None:
    runs = sys.argv[1:]
    if not runs:
        raise SystemExit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        entries = [ModelEntry(_name(run), run=run, description=ABOUT) for run in runs]
        talking = ModelEntry(
            "In conversation",
            run=runs[0],
            teacher=talking_teacher(folder),
            description=IN_CONVERSATION,
            examples=MESSAGES,
        )
        settings = DemoSettings((*entries, talking))
        _, url, _ = launch(settings, prevent_thread_lock=True, quiet=True)
        wanted = {entry.name: median_ratio(url, entry.name) for entry in entries}
        first, second = entries[0].name, entries[1].name if len(entries) > 1 else None
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

            def shot(
                name: str, act: Callable[[Page], None], width: int = 1280, theme: str = "light", of: str = ""
            ) -> None:
                take(browser, f"{url}?__theme={theme}", FOLDER / f"{name}.png", act, width, wanted.get(of))

            shot("empty", lambda tab: None)
            shot("compare", compare, of=first)
            shot("compare-dark", compare, theme="dark", of=first)
            shot("compare-phone", compare, 390, of=first)
            shot("long", lambda tab: compare(tab, 400), of=first)
            shot("stopped", stop)
            shot("error", refuse)
            shot("chat", chat)
            shot("inside", look_inside)
            shot("inside-dark", look_inside, theme="dark")
            shot("inside-phone", look_inside, 390, "dark")
            if second is not None:
                shot("parallel", lambda tab: (choose(tab, second), compare(tab)), of=second)
                shot("parallel-inside", lambda tab: (choose(tab, second), look_inside(tab)))
            browser.close()


def take(
    browser: Browser, url: str, path: Path, act: Callable[[Page], None], width: int, wanted: float | None
) -> None:
    """One picture, again while the machine disturbs what it shows."""
    for _ in range(ATTEMPTS):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, device_scale_factor=2 if width < 500 else 1
        )
        tab = context.new_page()
        tab.goto(url)
        expect(tab.locator("#lp-run")).to_be_visible(timeout=30_000)
        act(tab)
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(500)
        content, shown = tab.screenshot(full_page=True), tab.locator(".lp-times").all_inner_texts()
        context.close()
        ratio = float(shown[0].rstrip("\u00d7")) if shown else None
        if wanted is None or (ratio is not None and abs(ratio / wanted - 1) <= TOLERANCE):
            save(content, path)
            print(f"{path.name}: {ratio or 'no'} times the speed")
            return
        print(f"{path.name} shows {ratio} times the speed, not {wanted:.2f}; once more")
    raise SystemExit(f"{path.name}: the machine is not quiet enough")


def median_ratio(url: str, name: str) -> float:
    """How many times the speed of the original, in the middle of some comparisons; the first does not count."""
    from gradio_client import Client  # after `launch`, which tells Gradio to send nothing home

    answers = [Client(url, verbose=False).predict(PROMPT, name, api_name="/compare") for _ in range(6)][1:]
    return statistics.median(
        a["compressed"]["tokens_per_second"] / a["original"]["tokens_per_second"] for a in answers
    )


def talking_teacher(folder: str) -> str:
    """The embedded teacher with a chat template: it was trained on none, but books are full of dialogue."""
    shutil.copytree(EMBEDDED_MODEL, folder, dirs_exist_ok=True)
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = DIALOGUE
    tokenizer.save_pretrained(folder)
    return folder


def ask(tab: Page, prompt: str, tokens: int = 96) -> None:
    """Fill in and start."""
    if tokens != 96:
        tab.click("#lp-sampling button")
        longest = tab.locator("#lp-sampling input[type=number]").first
        longest.fill(str(tokens))
        longest.press("Tab")
        tab.click("#lp-sampling button")
    tab.fill("#lp-prompt textarea", prompt)
    tab.click("#lp-run")


def finish(tab: Page) -> None:
    """Wait until both have ended."""
    expect(tab.locator("#lp-stop")).to_be_enabled()
    expect(tab.locator("#lp-run")).to_be_enabled(timeout=120_000)


def compare(tab: Page, tokens: int = 96) -> None:
    """Both answers to a prompt."""
    ask(tab, PROMPT, tokens)
    finish(tab)


def stop(tab: Page) -> None:
    """Stopped while the original writes."""
    ask(tab, PROMPT, 400)
    expect(tab.locator("#lp-answers .lp-state.lp-writing")).to_be_visible(timeout=30_000)
    tab.wait_for_timeout(700)
    tab.click("#lp-stop")
    expect(tab.locator("#lp-run")).to_be_enabled(timeout=30_000)


def refuse(tab: Page) -> None:
    """More than is read."""
    ask(tab, "Once upon a time " * 400)
    expect(tab.locator("#lp-answers .lp-problem")).to_be_visible(timeout=30_000)


def chat(tab: Page) -> None:
    """Two turns."""
    choose(tab, "In conversation")
    expect(tab.locator("#lp-new")).to_be_visible()
    for turn, message in enumerate(MESSAGES):
        ask(tab, message, 96 if turn else 48)
        finish(tab)
        expect(tab.locator("#lp-prompt textarea")).to_have_value("")


def look_inside(tab: Page) -> None:
    """The drawings and the next tokens."""
    tab.get_by_role("tab", name="Look inside").click()
    tab.fill("#lp-text textarea", f"{PROMPT} said that he had never seen such a storm.")
    tab.click("#lp-inspect")
    expect(tab.locator("#lp-positions summary").first).to_be_visible(timeout=60_000)


def choose(tab: Page, name: str) -> None:
    """A model of the list."""
    tab.click("#lp-model input")
    tab.get_by_role("option", name=name).click()
    expect(tab.locator("#lp-answers .lp-times")).to_have_count(0)
    tab.wait_for_timeout(500)


def save(content: bytes, path: Path) -> None:
    """Write a picture in as few colours as it needs."""
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=0)
    picture.save(path, optimize=True)


def _name(run: str) -> str:
    return Path(run).name.replace("-", " ").capitalize()


if __name__ == "__main__":
    main()
