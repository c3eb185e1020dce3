"""The site that scripts/docs.sh makes of docs/: it is built without a warning, and asks nothing of any network."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT

import gist_train

pytest.importorskip("material", reason="mkdocs-material (extra docs) is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site. A proxy that is not there takes all that would be asked of a network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


class Loaded(HTMLParser):
    """Addresses of what a browser loads by itself to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and attrs.get("src"):
            self.addresses.append(attrs["src"])
        elif tag == "link" and attrs.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attrs["href"])


def test_pages_load_nothing_from_elsewhere(site):
    """Behind a firewall a page that waits for a font or a script stays blank for a minute."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        loaded = Loaded()
        loaded.feed(path.read_text(encoding="utf-8"))
        assert len(loaded.addresses) >= 4
        for address in loaded.addresses:
            assert "//" not in address, path.name
            if path.name != "404.html":  # which a server shows, from its top
                assert (path.parent / address).exists(), (path.name, address)


def test_every_public_name_is_on_its_page(site):
    """A page made from docstrings leaves out, without a word, what its tool does not find."""
    html = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in gist_train.__all__ if f'id="gist_train.{name}"' not in html] == []


def test_formulas_are_drawn_without_a_script(site):
    """MathML is what browsers draw themselves; a fence that stayed TeX would be read as a riddle."""
    formulas = 0
    for path in (ROOT / "docs").rglob("*.md"):
        page = site / path.relative_to(ROOT / "docs").with_suffix(".html")
        page = page.with_name("index.html") if page.name == "README.html" else page
        html = page.read_text(encoding="utf-8")
        fences = path.read_text(encoding="utf-8").count("```math\n")
        assert html.count("<math ") == fences
        formulas += fences
    assert formulas >= 4


def test_every_page_can_be_searched(site):
    """The index is in the site, and in a script too, for pages that are opened from a folder."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert {"loss.html", "data/pairs.html", "security.html", "changelog.html"} <= places
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")


def test_llms_txt_leads_to_pages_of_the_site(site):
    """It is read from the site's top, where the pages' Markdown lies elsewhere than in the checkout."""
    targets = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert len(targets) > 20
    assert [target for target in targets if not (site / target).is_file()] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_search_finds_pages_from_a_folder(site):
    """A browser starts no worker for a page of a folder: without the frame in its place the search stays empty."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    asked, faults = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("temperature")
        page.wait_for_selector(".md-search-result__item")
        found = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
        browser.close()
    assert faults == []
    assert any("/loss.html" in address for address in found)
    assert [address for address in asked if not address.startswith("file:")] == []
