"""A real Chromium and what tests of pages need beside it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 30, every: float = 0.1) -> object:
    """Return the first true value of `condition`; fail with `what` when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(every)


def answers(url: str) -> bool:
    """Return whether a page is there."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def shot(page: Page, folder: Path, name: str) -> None:
    """Leave a screenshot."""
    page.screenshot(path=str(folder / f"{name}.png"))


@contextlib.contextmanager
def chromium(shots: Path) -> Iterator[Browser]:
    """Yield this machine's Chromium; at the end every page that is open leaves a picture of how it was left."""
    shots.mkdir(exist_ok=True)
    program = os.environ.get("NBGPU_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        for number, page in enumerate(page for context in browser.contexts for page in context.pages):
            shot(page, shots, f"last-{number}")
        browser.close()
