"""Pages as a browser has them: an HTML file, parsed, and driven in headless Chromium."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INK_AND_PAPER = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"


class Texts(HTMLParser):
    """The elements of a page, and its text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.addresses, self.text, self._script = [], [], "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self._script = tag in ("script", "style")

    def handle_endtag(self, _: str) -> None:
        self._script = False
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += "" if self._script else data


def parsed(page: str) -> Texts:
    """The page's elements and texts."""
    texts = Texts()
    texts.feed(page)
    return texts


@contextmanager
def opened(path: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page at `path` in a window of so many pixels, on which anything may be done; skips where there is no Chromium.

    Once the block has ended it must have met no error and no dialog, sent no request, been no wider than the window, and have
    light text on dark paper where `scheme` is "dark".
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    errors: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = page.evaluate(INK_AND_PAPER)
        browser.close()
    assert errors == []
    assert [url for url in requests if not re.match(r"file:|data:|blob:", url)] == []
    ink, paper = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (ink > paper) == (scheme == "dark")
