"""Template output is escaped automatically, and an unknown value is an error."""

from __future__ import annotations

import re
import sys

import jinja2
import markdown_it
import pytest
from markupsafe import Markup

from df11.formats import errors
from df11.pipelines import rendering
from tests.support import manifests as made

ENVIRONMENTS = pytest.mark.parametrize(
    "environment", [rendering.html_environment, rendering.markdown_environment], ids=["html", "markdown"]
)
TEMPLATES = ("report.html.j2", "report.css.j2", "report.js", "card.md.j2")


@pytest.mark.parametrize("name", made.EVIL_NAMES)
def test_a_value_is_text_in_html(name):
    template = rendering.html_environment().from_string(
        '{% macro m(x) %}<b title="{{ x }}">{{ x }}</b>{% endmacro %}{{ m(x) }}'
    )
    found = re.fullmatch(r'<b title="([^"<>]*)">([^<>]*)</b>', template.render(x=name))
    assert found is not None
    assert Markup(found[1]).unescape() == Markup(found[2]).unescape() == errors.printable(name, None)


@pytest.mark.parametrize("name", made.EVIL_NAMES)
def test_a_value_is_text_in_markdown(name):
    template = rendering.markdown_environment().from_string("{% macro m(x) %}a{{ x }}b{% endmacro %}{{ m(x) }}")
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(template.render(x=name))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children or []} <= {"text", "text_special"}
    assert "".join(child.content for child in tokens[1].children or []) == f"a{errors.printable(name, None)}b"


@ENVIRONMENTS
def test_what_is_escaped_stays_as_it_is(environment):
    assert environment().from_string("{{ x }} {% set y %}<i>{% endset %}{{ y }}").render(x=Markup("<b>*")) == "<b>* <i>"


@ENVIRONMENTS
@pytest.mark.parametrize("text", ["{{ x }}", "{{ x.y }}", "{% if x %}{% endif %}", "{% for y in x %}{% endfor %}"])
def test_an_unknown_value_is_an_error(environment, text):
    with pytest.raises(jinja2.UndefinedError):
        environment().from_string(text).render()


@pytest.mark.parametrize("name", ['x"; import os', "a b", "", "$(x)", "x\n", "`", "é"])
def test_a_literal_needs_no_quotes(name):
    template = rendering.markdown_environment().from_string("{{ x | literal }}")
    assert template.render(x="me/a_model-df11.x") == "me/a_model-df11.x"
    with pytest.raises(ValueError, match="cannot appear in a code block"):
        template.render(x=name)


def test_templates_never_switch_escaping_off():
    for name in TEMPLATES:
        source, _, _ = rendering.html_environment().loader.get_source(rendering.html_environment(), name)
        assert not re.search(r"\|\s*safe|autoescape|Markup", source), name
    assert sorted(rendering.html_environment().list_templates()) == sorted(TEMPLATES)


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(errors.MissingExtraError, match=r"df11\[report\]"):
        rendering.html_environment()
