"""Pictures of the demo for docs/images: a run in a real browser, as `hf-layerprune demo` shows it.

    python recipes/tiny/make_screenshots.py RUN

Needs Playwright and a Chromium. Run it on a quiet machine: the pictures show speeds.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from hf_layerprune.demo import launch, settings_of

FOLDER = Path(__file__).parent.parent.parent / "docs" / "images"
PROMPT = "The old man looked out of the window and"
SIZES = {"": (1280, "light"), "-dark": (1280, "dark"), "-phone": (390, "light")}
"""Width and theme by the end of a picture's name."""


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    FOLDER.mkdir(exist_ok=True)
    _, url, _ = launch(settings_of(sys.argv[1:]), prevent_thread_lock=True, quiet=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for end, (width, theme) in SIZES.items():
            page = browser.new_context(viewport={"width": width, "height": 844}).new_page()
            page.goto(f"{url}?__theme={theme}")
            compare(page)
            page.screenshot(path=FOLDER / f"compare{end}.png", full_page=True)
            look_inside(page)
            page.screenshot(path=FOLDER / f"inside{end}.png", full_page=True)
        browser.close()


def compare(page: Page) -> None:
    """Both answers to a prompt."""
    page.fill("#lp-prompt textarea", PROMPT)
    page.click("#lp-run")
    expect(page.locator("#lp-facts p")).to_contain_text("answer", timeout=120_000)


def look_inside(page: Page) -> None:
    """The plots and the next tokens."""
    page.get_by_role("tab", name="Look inside").click()
    page.fill("#lp-text textarea", f"{PROMPT} said that he had never seen such a storm.")
    page.click("#lp-inspect")
    expect(page.locator("#lp-positions .token").first).to_be_visible(timeout=60_000)


if __name__ == "__main__":
    main()
