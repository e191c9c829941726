"""Index files (``x.safetensors.index.json``): which shards they name, and the same file with other names in it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from df11.formats import errors, json_text, layout

MOST_VALUES: Final = layout.MAX_TENSORS + 65_536
"""JSON values of an index: a shard for each tensor, and what else it says."""

_INDEX: Final = re.compile(r"\.index(\.[^./]+)?\.json\Z")
"""What follows a shard's suffix in an index file's name. In a variant, it holds the variant's name."""
_TOKEN: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:]')
"""Strings and brackets. Possessive, so that a long string does not fill the memory with places to go back to."""


def split_index_name(name: str) -> tuple[str, str] | None:
    """Split an index file's name into the name it shares with its shards and the rest.

    For example ``a/x.safetensors`` and ``.index.json``.

    None for the name of any other file.
    """
    found = _INDEX.search(name)
    return (name[: found.start()], found[0]) if found else None


def read_shards(data: bytes, where: str) -> Mapping[str, str]:
    """The map from tensors to shards in the index file at ``where``. Raises SafetensorsError if it is not one."""
    document = json_text.parse(
        data, what="the index", where={"file": where}, error=errors.SafetensorsError, values=MOST_VALUES
    )
    shards = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise errors.SafetensorsError("not an index of safetensors shards", file=where)
    return shards


def rewrite_index(data: bytes, rename: Callable[[str], str], where: str) -> bytes:
    """Rename the shards in an index file and keep every other character, so that renaming back restores the bytes."""
    shards = read_shards(data, where)
    text = data.decode("utf-8")
    parts = []
    position = 0
    for token in _weight_map_values(text):
        raw = token.group()
        old = json.loads(raw)
        new = rename(old)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
        end = old[same:] + '"'
        if new != old and raw.endswith(end):  # The rest of the name keeps its spelling.
            parts += [text[position : token.start()], raw.removesuffix(end), new[same:], '"']
            position = token.end()
    result = "".join([*parts, text[position:]])
    if json.loads(result)["weight_map"] != {tensor: rename(name) for tensor, name in shards.items()}:
        raise errors.SafetensorsError(
            "the index spells the names of its shards in a way that cannot be rewritten", file=where
        )
    return result.encode("utf-8")


def _weight_map_values(text: str) -> Iterator[re.Match[str]]:
    # The strings that are values of the top-level object weight_map. The text is known to be JSON.
    depth = 0
    inside = False
    before = kind = ""
    for token in _TOKEN.finditer(text):
        before, kind = kind, token.group()
        if kind in "{[":
            depth += 1
        elif kind in "}]":
            depth -= 1
            inside = inside and depth > 1
        elif kind != ":" and before == ":" and inside:
            yield token
        elif kind == ":" and depth == 1:
            inside = json.loads(before) == "weight_map"
