"""Turn an SVG from matplotlib into one for a page that forbids inline styles and has a light and a dark mode."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from xml.etree import ElementTree

_SVG: Final = "{http://www.w3.org/2000/svg}"
_HREF: Final = "{http://www.w3.org/1999/xlink}href"
_LONG_NUMBER: Final = re.compile(r"-?[0-9]+\.[0-9]{3,}")
_URL: Final = re.compile(r"url\(#([^)]+)\)")


def for_page(data: bytes, name: str, title: str, description: str, roles: Mapping[str, str]) -> str:
    """The element for an HTML page: it has no style, script or metadata, and loads nothing.

    ``name``: prefix of its identifiers, so that one page can hold several. ``roles``: the role of each colour
    (``#rrggbb``), which becomes ``var(--ROLE)``. ``title`` and ``description`` are for readers who cannot see it.
    """
    root = ElementTree.fromstring(data)  # noqa: S314 - it was drawn here
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag not in {
                _SVG + tag
                for tag in ("svg", "g", "defs", "path", "use", "text", "tspan", "rect", "clipPath", "pattern")
            }:
                parent.remove(child)  # Metadata, and a style that would apply to the whole page.
    used: set[str] = set()
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "style":
                del element.attrib[key]
                element.attrib.update(_attributes(value))
            elif key == _HREF:
                del element.attrib[key]
                element.set("href", f"#{name}-{value[1:]}")
        used.update(found for value in element.attrib.values() for found in _URL.findall(value))
        if "href" in element.attrib:
            used.add(element.attrib["href"].removeprefix(f"#{name}-"))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
                continue
            if key == "id":
                value = f"{name}-{value}"
            elif key in ("d", "x", "y", "width", "height", "transform"):
                value = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
            element.set(key, _URL.sub(lambda match: f"url(#{name}-{match[1]})", value))
        _hoist(element)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"class": "plot", "role": "img", "aria-labelledby": f"{name}-title {name}-description"})
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, {"id": f"{name}-{'description' if tag == 'desc' else tag}"})
        element.text = text
        root.insert(0, element)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, role in roles.items():
        text = text.replace(f'"{colour}"', f'"var(--{role})"')
    return re.sub(r">\s+<", "><", text)


def _attributes(style: str) -> dict[str, str]:
    # A style as attributes, which a page that forbids inline styles accepts. The page chooses the font family.
    found = {}
    for declaration in style.split(";"):
        key, _, value = declaration.partition(":")
        key, value = key.strip(), value.strip()
        if key == "font":
            size = re.search(r"([0-9.]+)px", value)
            if size:
                found["font-size"] = size[1]
            if "bold" in value or "700" in value:
                found["font-weight"] = "bold"
        elif key and key != "font-family":
            found[key] = value
    return found


def _hoist(element: ElementTree.Element) -> None:
    # State shared attributes of thousands of points only once.
    children = list(element)
    if len(children) > 1 and all(child.tag.endswith("use") for child in children):
        for key, value in list(children[0].attrib.items()):
            if key not in ("x", "y", "href", "id", "transform", "clip-path") and all(
                child.get(key) == value for child in children
            ):
                element.set(key, value)
                for child in children:
                    del child.attrib[key]
