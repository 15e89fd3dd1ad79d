"""The screenshots of docs/space.md: the demo of finished runs, in a real browser.

    python recipes/tiny/make_screenshots.py runs/demo [RUN ...]

Needs Playwright and a Chromium that is installed already. Run it on a quiet machine: the pictures show speeds.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from hf_layerprune.demo import DemoService, DemoSettings, ModelEntry, open_catalog
from hf_layerprune.demo.page import build_page, launch_page

FOLDER = Path(__file__).parent.parent.parent / "docs" / "images"
PROMPT = "The old man looked out of the window and"
ABOUT = "A small English model that was trained on old books, and shallower copies of it."
SHOTS = (
    ("compare", 1280, "light", 1.0),
    ("compare-dark", 1280, "dark", 1.0),
    ("compare-phone", 390, "light", 2.0),
    ("inside", 1280, "light", 1.0),
    ("inside-dark", 1280, "dark", 1.0),
    ("inside-phone", 390, "dark", 2.0),
)


def main() -> None:
    entries = tuple(ModelEntry(_name(Path(run)), run=run, description=ABOUT) for run in sys.argv[1:])
    settings = DemoSettings(entries)
    service = DemoService(settings, open_catalog(settings))
    service.comparer.preload(service.catalog.first)
    page = build_page(service)
    _, url, _ = launch_page(page, prevent_thread_lock=True, quiet=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, theme, scale in SHOTS:
            context = browser.new_context(viewport={"width": width, "height": 844}, device_scale_factor=scale)
            tab = context.new_page()
            tab.goto(f"{url}?__theme={theme}")
            expect(tab.locator("#lp-run")).to_be_visible(timeout=30_000)
            (look_inside if name.startswith("inside") else compare)(tab)
            tab.mouse.move(0, 0)
            tab.wait_for_timeout(500)
            save(tab.screenshot(full_page=True), FOLDER / f"{name}.png")
            context.close()
        browser.close()
    page.close()


def compare(tab: Page) -> None:
    """Both answers to a prompt."""
    tab.fill("#lp-prompt textarea", PROMPT)
    tab.click("#lp-run")
    expect(tab.locator("#lp-answers mark.lp-first").first).to_be_visible(timeout=60_000)


def look_inside(tab: Page) -> None:
    """The drawings and the next tokens."""
    tab.get_by_role("tab", name="Look inside").click()
    tab.fill("#lp-text textarea", f"{PROMPT} said that he had never seen such a storm.")
    tab.click("#lp-inspect")
    expect(tab.locator("#lp-positions summary").first).to_be_visible(timeout=60_000)


def save(content: bytes, path: Path) -> None:
    """Write a picture in as few colours as it needs."""
    picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=0)
    picture.save(path, optimize=True)


def _name(run: Path) -> str:
    return run.name.replace("-", " ").capitalize()


if __name__ == "__main__":
    main()
