"""Pages as a code host shows them: links lead somewhere, blocks say their language."""

import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
FENCES = re.compile(r"^(```+)(.*)$", re.MULTILINE)


def named(path):
    return str(path.relative_to(ROOT))


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """Of the headings of a page, as code hosts and mkdocs make them."""
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path):
    """mkdocs looks at links within docs/ alone; README's lead there too."""
    wrong = []
    for match in LINK.finditer(without_blocks(path.read_text(encoding="utf-8"))):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if target.startswith(("http://", "https://")):
            continue
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and anchor not in {*anchors(there.read_text(encoding="utf-8"))}):
            wrong.append(match[0])
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_blocks_say_their_language(path):
    """A block without one is drawn without colours, and no test knows how to run it; an indented one is not seen at all."""
    text = path.read_text(encoding="utf-8")
    fences = FENCES.findall(text)
    assert len(fences) % 2 == 0
    assert [language for _, language in fences[::2] if language not in KNOWN] == []
    assert re.findall(r"\n\n    \S.*", without_blocks(text)) == []


KNOWN = ("sh", "yaml", "json", "python", "math", "text")


def test_every_page_is_in_the_menu():
    """mkdocs says so too, where it is installed."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    assert [named(path) for path in docs.rglob("*.md") if str(path.relative_to(docs)) not in menu] == []


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_files_that_pages_name_exist(path):
    """A reader who is sent to a file that was renamed stops reading."""
    spans = re.findall(r"`([^`\n]+)`", without_blocks(path.read_text(encoding="utf-8")))
    pattern = r"[\w.-]+/[\w./-]+\.(?:py|sh)|(?:scripts|configs|examples|tests)/[\w./-]*"
    files = [one for one in spans if re.fullmatch(pattern, one)]
    assert [one for one in files if not (ROOT / one).exists() and not (ROOT / "gist_train" / one).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "assets").glob("*.svg")), ids=named)
def test_drawings_say_what_they_show(path):
    """Some readers hear a page, and some read it at night."""
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    words = [root.find(f"{{http://www.w3.org/2000/svg}}{name}").text for name in ("title", "desc")]
    assert all(words)
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r"(?:href|src)=|url\((?!#)", text) == []
