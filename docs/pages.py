"""Makes a site of the repository: mkdocs.yml names the pages by their paths in it, wherever they lie.

A page therefore has the same links here and in a checkout. Files that pages link to go with them; a link to something
that does not exist stays as it is, and MkDocs reports it. MkDocs calls the functions whose names start with ``on_``.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from pygments.formatters import HtmlFormatter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

LINK = re.compile(r"""\]\(<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|\b(?:href|src)="([^"]+)""", re.MULTILINE)
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
LOST_LIST = re.compile(r"^\s*(?:[*-]|1\.) .*", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>(~?)([\w.]+)</code>")
STYLES = {"light": "default", "dark": "github-dark"}
CSS = "site.css"
LOG = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages of the navigation, and whatever these link to."""
    root = Path(config.config_file_path).parent
    listed = set(_paths(config.nav))
    forgotten = {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")} - listed
    if forgotten:
        raise PluginError(f"not in the navigation of mkdocs.yml: {', '.join(sorted(forgotten))}")
    site = Files([file for file in files if file.src_dir != config.docs_dir])
    waiting, seen = sorted(listed), set(listed)
    while waiting:
        path = waiting.pop()
        site.append(_file(path, root, config, in_navigation=path in listed))
        if path.endswith(".md"):
            new = {target for target in _targets(path, root) if (root / target).is_file()} - seen
            seen |= new
            waiting += new
    css = [(root / "docs" / CSS).read_text(encoding="utf-8")]
    for theme, style in STYLES.items():
        css.append(HtmlFormatter(style=style).get_style_defs(f"[data-bs-theme={theme}] .highlight"))
    site.append(File.generated(config, CSS, content="\n".join(css)))
    return site


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn references of docstrings, such as ``:class:`~df11.formats.errors.Df11Error```, into links.

    Warns of lists that GitHub shows and MkDocs does not: it wants a blank line before a list and four spaces for an
    inner one.
    """
    del config, files
    for lost in LOST_LIST.findall(CODE.sub("", html)):
        LOG.warning("%s: not shown as a list: %s", page.file.src_uri, lost)

    def link(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = f"<code>{name.rpartition('.')[2] if short else name}</code>"
        return f'<autoref identifier="{name}" optional>{shown}</autoref>' if "." in name else shown

    return ROLE.sub(link, html)


def _paths(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _paths(entry)


def _file(path: str, root: Path, config: MkDocsConfig, *, in_navigation: bool) -> File:
    level = InclusionLevel.INCLUDED if in_navigation else InclusionLevel.NOT_IN_NAV
    file = File(path, str(root), config.site_dir, config.use_directory_urls, inclusion=level)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def _targets(path: str, root: Path) -> Iterator[str]:
    for match in LINK.finditer((root / path).read_text(encoding="utf-8")):
        target = next(filter(None, match.groups())).partition("#")[0]
        if target and ":" not in target:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
