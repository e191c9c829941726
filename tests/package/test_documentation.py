"""What the documentation points to exists: files, headings, targets of make. `make docs` checks the site itself."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import markdown_it
import pytest
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "formats", "examples", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def parsed(text: str) -> list[Token]:
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def links(text: str) -> Iterator[str]:
    """Where links and pictures of a page lead, those to other hosts left out."""
    for token in parsed(text):
        target = token.attrs.get("href") or token.attrs.get("src")
        if target and not re.match(r"[a-z]+:", str(target)):
            yield str(target)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings; MkDocs is set up to make the same."""
    found: dict[str, int] = {}
    tokens = parsed(text)
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            title = "".join(part.content for part in following.children or ())
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, last in found.items() for number in range(last + 1)}


@cache
def anchors_of(page: Path) -> set[str]:
    return anchors(page.read_text(encoding="utf-8"))


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.is_file()  # A folder is no page of the site.
        if not inside or (anchor and anchor not in (anchors_of(target) if path else anchors(text))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(ROOT / name, (ROOT / name).read_text(encoding="utf-8")) == []


def test_the_readme_leads_to_every_guide() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    named = {link.removeprefix("docs/") for link in links((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert pages <= named


@pytest.mark.parametrize(
    "link", ["docs/no-such-page.md", "docs/jobs.md#no-such-heading", "#no-such-heading", "docs", "../elsewhere.md"]
)
def test_a_broken_link_is_found(link: str) -> None:
    text = f"# Title\n\n[right](docs/jobs.md#many-machines), [right](#title), [wrong]({link})\n"
    assert broken(ROOT / "README.md", text) == [link]


@pytest.mark.parametrize("name", NAMES)
def test_targets_of_make_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(
        re.findall(r"^\.PHONY: (.*?)(?<!\\)$", makefile, re.MULTILINE | re.DOTALL)[0].replace("\\", "").split()
    )
    targets |= {
        f"test-{room}" for room in ("converter", "formats", "pipelines", "runtime", "storage", "newest", "oldest")
    }
    code = [
        token.content
        for token in parsed((ROOT / name).read_text(encoding="utf-8"))
        if token.type.startswith(("code", "fence"))
    ]
    used = {target for text in code for target in re.findall(r"(?:^|\$ )make ([a-z][\w-]*)", text, re.MULTILINE)}
    assert used <= targets


@pytest.mark.parametrize("name", NAMES)
def test_python_is_python(name: str) -> None:
    for token in parsed((ROOT / name).read_text(encoding="utf-8")):
        if token.type == "fence" and token.info == "python":
            compile(token.content, name, "exec")


def test_the_api_page_names_what_there_is() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 10
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
