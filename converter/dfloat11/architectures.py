"""The models in ``architectures.toml``: their units, and what tells the shapes of their weights."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from df11.converter.dfloat11.patterns import Pattern


@dataclass(frozen=True, slots=True)
class UnitKind:
    """Units of one kind. ``parts``: of ``pattern_dict``, empty for a linear layer or an embedding."""

    pattern: Pattern
    parts: tuple[str, ...]
    norm: tuple[str, ...]
    """Norms that may have a size, below the unit if there is a dot at the start."""
    size: tuple[str, ...]
    """Where config.json may have a size, as paths with dots."""
    columns: tuple[str, ...]
    """The parts that have that many columns."""
    rows: tuple[str, ...]
    """The parts that have that many rows."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model."""

    name: str
    units: tuple[UnitKind, ...]
    tied: tuple[tuple[str, str], ...]
    """Pairs of units whose weights are the same if config.json says so."""


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """All that are known."""
    path = Path(__file__).with_name("architectures.toml")
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Architecture(
            one["name"],
            tuple(
                UnitKind(
                    Pattern(unit["pattern"], file=str(path)),
                    tuple(unit["parts"]),
                    tuple(unit.get("norm", ())),
                    tuple(unit.get("size", ())),
                    tuple(unit.get("columns", ())),
                    tuple(unit.get("rows", ())),
                )
                for unit in one["unit"]
            ),
            tuple((first, second) for first, second in one.get("tied", ())),
        )
        for one in document["architecture"]
    )


def known_parts(unit: str, count: int) -> tuple[str, ...] | None:
    """The parts of a unit by its name and their number; None if no model is known that has it."""
    for one in architectures():
        for kind in one.units:
            if max(len(kind.parts), 1) == count and kind.pattern.matches(unit):
                return kind.parts
    return None


def known_shape(
    unit: str, part: str, elements: int, config: Mapping[str, Any], vectors: Mapping[str, int]
) -> tuple[int, int] | None:
    """The shape of a part of ``elements`` weights, by a norm beside it, or by config.json; None if none tells.

    ``part``: an attribute of the unit, or "" if it is a linear layer or an embedding itself. ``vectors``: the elements
    of tensors of one dimension, by name.
    """
    name = part or unit.rpartition(".")[2]
    for one in architectures():
        for kind in one.units:
            if name in (*kind.columns, *kind.rows) and (part in kind.parts or not part) and kind.pattern.matches(unit):
                norms = (f"{unit}{norm}" if norm.startswith(".") else norm for norm in kind.norm)
                size = next((vectors[norm] for norm in norms if norm in vectors), None) or _size(config, kind.size)
                if size and not elements % size:
                    rest = elements // size
                    return (rest, size) if name in kind.columns else (size, rest)
    return None


def tied_units(config: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Pairs of units of which config.json says that the second is the first."""
    text = config.get("text_config")
    says = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return [pair for one in architectures() for pair in one.tied] if says is True else []


def _size(config: Mapping[str, Any], paths: Sequence[str]) -> int | None:
    for path in paths:
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if type(value) is int and 0 < value < 1 << 31:
            return value
    return None
