"""Pictures of the demo for docs/images: a run in a real browser, as `hf-layerprune demo` shows it.

    python recipes/tiny/make_screenshots.py RUN docs/images
    python recipes/tiny/make_screenshots.py RUN docs/images "Write a Python function that adds two numbers."

Without a prompt they show the first view, with the example that was answered while the demo started.

Needs Playwright and a Chromium. Run it on a quiet machine: the pictures show speeds.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

PAGES = {"demo-light": (1440, "light"), "demo-dark": (1440, "dark"), "demo-phone": (390, "light")}
"""Width and theme of each picture."""


def main() -> None:
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    run, folder, *prompts = sys.argv[1:]
    command = [sys.executable, "-m", "hf_layerprune.cli", "demo", run]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo,
        sync_playwright() as playwright,
    ):
        url = next(word for line in demo.stdout for word in line.split() if word.startswith("http"))
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, theme) in PAGES.items():
            is_phone = width < 500  # it says nothing of keys
            page = browser.new_page(viewport={"width": width, "height": 844}, is_mobile=is_phone, has_touch=is_phone)
            page.goto(f"{url}?__theme={theme}")
            for prompt in prompts:
                page.fill("#lp-prompt textarea", prompt)
                page.click("#lp-run")
                expect(page.locator("#lp-answers")).to_contain_text(prompt, timeout=300_000)
            expect(page.get_by_text("Link to this comparison")).to_be_visible(timeout=300_000)
            height = page.evaluate("document.documentElement.scrollHeight")
            page.set_viewport_size({"width": width, "height": height})  # a full page would not be a phone's
            page.screenshot(path=Path(folder, f"{name}.png"))
        browser.close()
        demo.terminate()


if __name__ == "__main__":
    main()
