"""Templates -> HTML files that need nothing else: no request leaves them, and texts from data stay texts."""

import json
import re
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from gist_train.config.errors import Fault, UserError, shown
from gist_train.data.files import check_target, write_text
from gist_train.version import __version__

SHOWN_CHARACTERS = 600
"""Of a text from data: of many long ones a page would grow too large to be sent around."""


def rendered(template: str, **values: object) -> str:
    """The page that a template makes of `values`, each of which is escaped.

    Args:
        template: its path from this package's folder; it extends pages/layout.html.jinja.
    """
    environment = Environment(
        loader=PackageLoader("gist_train", "."),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shortened": shortened, "breakable": breakable, "moment": moment}
    return environment.get_template(template).render(**values, version=__version__)


def script_json(value: object) -> str:
    """JSON that is safe within a script element, whatever texts are in it."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text, or its first `most` characters and how many more it has."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters more)"


def breakable(name: str) -> Markup:
    """A name, escaped, that may go on in the next line after its slashes, dots and underscores."""
    return Markup(re.sub(r"(?<=[/._])", "<wbr>", str(escape(name))))


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and time of this machine."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def check_page(option: str, to: Path) -> None:
    """Raises UserError where `to` is no .html file, or none that can be written: a browser would show its text."""
    check_target(option, to)
    if to.suffix not in (".html", ".htm"):
        raise UserError(Fault(option, shown(to), "a file that ends in .html", "name one"))


def write_page(page: str, to: Path, option: str) -> None:
    """Writes the page, or nothing.

    Raises:
        UserError: `to` is no file that can be written.
    """
    check_page(option, to)
    write_text(to, page)
