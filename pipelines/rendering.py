"""Templates of the report and the model card, and the treatment of every value that goes into them.

Names of tensors, files and repositories are untrusted text. The environments escape all output that is not
``Markup``, so that no template can forget to.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from df11.formats import errors
from df11.pipelines import wording

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_FOLDER: Final = Path(__file__).parent / "templates"
LONGEST_NAME: Final = 200
_PLAIN: Final = frozenset(" ,;-/()%+.")
_CODE: Final = re.compile(r"[A-Za-z0-9_./+-]{1,200}")
_LITERAL: Final = re.compile(r"[A-Za-z0-9_./-]+")


def html_environment() -> Environment:
    """For pages. Values are escaped, and invisible characters become visible. Needs jinja2."""
    return _environment(_shown, {"csp_hash": _csp_hash, "fitted": _fitted})


def markdown_environment() -> Environment:
    """For Markdown. Values become text without any markup. Needs jinja2.

    Filters for other places: ``code`` for names as inline code, ``target`` for the target of a link, and ``literal``
    for names in code blocks.
    """
    return _environment(_text, {"code": _code, "target": _target, "literal": _literal})


def _environment(finalize: Callable[[Any], Any], filters: dict[str, Callable[..., Any]]) -> Environment:
    try:
        import jinja2
    except ModuleNotFoundError:
        raise errors.missing_extra("jinja2", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "bits": wording.bits,
        "count": wording.count,
        "number": "{:,}".format,
        "percent": wording.percent,
        "size": wording.size,
        **filters,
    }
    return environment


# HTML


def _shown(value: object) -> object:
    return value if hasattr(value, "__html__") else errors.printable(str(value), None)


def _fitted(name: str) -> str:
    return wording.fitted(name, LONGEST_NAME)


def _csp_hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


# Markdown


def _text(value: object) -> object:
    return value if hasattr(value, "__html__") else _markup(_escaped(str(value)))


def _escaped(text: str) -> str:
    """Text that has no meaning in Markdown, not even in a table: no markup, no links, no line breaks."""
    marked = "".join(
        f"&#{ord(character)};"
        if character.isascii() and not character.isalnum() and character not in _PLAIN
        else character
        for character in errors.printable(text, None)
    )
    return re.sub(r"(?i)(www)\.", r"\1&#46;", marked)


def _code(name: str) -> Markup:
    """A name as inline code; as HTML if it contains something that would end the code or the table cell."""
    if _CODE.fullmatch(name):
        return _markup(f"`{name}`")
    return _markup(f"<code>{_escaped(wording.fitted(name, LONGEST_NAME))}</code>")


def _target(address: str) -> Markup:
    return _markup(quote(address, safe=":/?&=#%~+,.@-_"))


def _literal(name: str) -> Markup:
    """A name in a code block. The caller has checked that it needs no quotes there."""
    if not _LITERAL.fullmatch(name):
        raise ValueError(f"{name!r} cannot appear in a code block")
    return _markup(name)


def _markup(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - escaped or checked above
