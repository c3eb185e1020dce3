"""llms.txt, the list of all pages for programs that read documentation: it has what the menu has, and the site has it too."""

import re

import yaml
from conftest import ROOT
from support.blocks import BASE

from gist_train.config.loading import load_config

TEXT = (ROOT / "llms.txt").read_text(encoding="utf-8")
LINE = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\): (\S.*)$", re.MULTILINE)
BESIDE = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}


def menu():
    """Section -> the pages that mkdocs.yml has in it; a page of no section is one of its own."""
    for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]:
        ((section, pages),) = entry.items()
        listed = pages if isinstance(pages, list) else [pages]
        yield section, [next(iter(page.values())) if isinstance(page, dict) else page for page in listed]


def test_every_page_of_the_menu_is_listed():
    """A page that is not listed is not read: an assistant answers from what it finds here."""
    sections = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
    listed = {
        section: [BESIDE.get(path, path.removeprefix("docs/")) for _, path, _ in LINE.findall(lines)]
        for section, lines in zip(sections[::2], sections[1::2], strict=True)
    }
    assert list(listed.items()) == list(menu())


def test_each_page_is_listed_by_its_title():
    """A line whose page has become another sends its reader to the wrong place."""
    lines = LINE.findall(TEXT)
    assert len(lines) == len(re.findall(r"^- ", TEXT, re.MULTILINE))
    titles = [re.search(r"^# (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)[1] for _, path, _ in lines]
    assert [title for title, _, _ in lines] == titles


def test_the_yaml_in_it_is_one(tmp_path):
    """What an assistant copies from here is the first that a user tries."""
    block = "\n".join(line[4:] for line in TEXT.splitlines() if line.startswith("    "))
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    config = load_config(path)
    assert (config.model.name, config.guide.name) == (BASE["model"]["name"], BASE["guide"]["name"])
