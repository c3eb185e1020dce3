"""What mkdocs does to the pages of docs/ besides: formulas, pages that lie beside docs/, and the Markdown itself for llms.txt.

mkdocs.yml names this file under `hooks`, and mkdocs calls the functions that begin with `on_`.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.superfences import SuperFencesException

BESIDE = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
"""Files that a code host looks for at the top -> their pages here."""
UP = re.compile(r"\]\((?:\.\./)+(" + "|".join(map(re.escape, BESIDE)) + r")(?=[#)])")
INTO_DOCS = re.compile(r"\]\(docs/")
BY_NAME = re.compile(r"\]\((" + "|".join(map(re.escape, BESIDE)) + r")(?=[#)])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Has fences of the language `math`, which code hosts draw, become MathML, which browsers draw without a script."""
    fence = {"name": "math", "class": "math", "format": _formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", []).append(fence)
    return config


def _formula(source: str, *_: Any, **__: Any) -> str:
    """A fence's formula as MathML.

    Raises:
        SuperFencesException: a command that latex2mathml leaves as it is. Of all others mkdocs would show the fence as code.
    """
    formula = convert(source, display="block")
    if "\\" in formula:
        raise SuperFencesException(f"no MathML for all of this formula: {source}")
    return formula


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files beside docs/ as pages of it, and llms.txt."""
    for name, page in {**BESIDE, "llms.txt": "llms.txt"}.items():
        text = (Path(config.docs_dir).parent / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_led_here(text)))
    return files


def _led_here(text: str) -> str:
    """A file beside docs/ whose links lead to pages of the site."""
    text = INTO_DOCS.sub("](", text)
    return BY_NAME.sub(lambda match: f"]({BESIDE[match[1]]}", text)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Has links to the files beside docs/ lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    return UP.sub(lambda match: f"]({up}{BESIDE[match[1]]}", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Puts each page's Markdown beside it: llms.txt leads there."""
    for path in Path(config.docs_dir).rglob("*.md"):
        shutil.copy(path, Path(config.site_dir) / path.relative_to(config.docs_dir))
    for name, page in BESIDE.items():
        shutil.copy(Path(config.docs_dir).parent / name, Path(config.site_dir) / page)
