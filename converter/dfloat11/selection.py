"""Which tensors of a model become the units of a checkpoint in DFloat11's layout: by a known model, or by patterns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from df11.converter.dfloat11.architectures import architectures, tied_units
from df11.converter.dfloat11.exported import Tensor
from df11.converter.dfloat11.layout import joined
from df11.converter.dfloat11.patterns import Pattern
from df11.formats import errors

Patterns = Sequence[tuple[Pattern, tuple[str, ...]]]
"""As pattern_dict has them: what units match, and their parts."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What becomes of the tensors of a model."""

    units: Mapping[str, tuple[Tensor, ...]]
    """Units by name, with the tensors of their parts."""
    plain: tuple[Tensor, ...]
    """The others."""
    patterns: Patterns
    """Those that match the units."""


def select(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], patterns: Patterns | None, where: str
) -> Selection:
    """The units of a model with these tensors; none if no known model has such, and no ``patterns`` are given.

    Raises CheckpointError for given patterns that do not fit the model.
    """
    tensors = {**_copies(tensors, config), **tensors}
    if patterns is not None:
        units, used = _match(tensors, patterns, where, must=True)
    else:
        known = [[(kind.pattern, kind.parts) for kind in one.units] for one in architectures()]
        found = [_match(tensors, one, where, must=False) for one in known]
        units, used = max(found, key=lambda one: _weights(one[0]))
    taken = {tensor.entry.name for parts in units.values() for tensor in parts}
    plain = tuple(tensor for name, tensor in tensors.items() if name not in taken)
    return Selection(units, plain, used)


def _weights(units: Mapping[str, Sequence[Tensor]]) -> int:
    return sum(part.entry.elements for parts in units.values() for part in parts)


def _copies(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    # DFloat11's loader ties nothing to what it decodes: tied weights are written under both names.
    copies = {}
    for first, second in tied_units(config):
        original = tensors.get(joined(first, "weight"))
        if original is not None:
            name = joined(second, "weight")
            copies[name] = Tensor(original.file, dataclasses.replace(original.entry, name=name), original.entry.name)
    return copies


def _match(
    tensors: Mapping[str, Tensor], patterns: Patterns, where: str, *, must: bool
) -> tuple[dict[str, tuple[Tensor, ...]], Patterns]:
    # The units that patterns describe, and the patterns that describe any.
    units: dict[str, tuple[Tensor, ...]] = {}
    used = []
    for pattern, parts in patterns:
        end = f".{parts[0]}.weight" if parts else ".weight"
        names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
        matching = [name for name in names if pattern.matches(name)]
        if not matching and must:
            what = "no tensors of the model fit a pattern"
            raise errors.CheckpointError(what, file=where, found=errors.shortened(pattern.text))
        for name in matching:
            wanted = [joined(joined(name, part) if part else name, "weight") for part in parts or ("",)]
            missing = [one for one in wanted if one not in tensors or not _fits(tensors[one])]
            if must and (missing or name in units):
                what = (
                    f"no matrix in BF16 has the name {errors.shortened(missing[0])}"
                    if missing
                    else "two patterns match"
                )
                raise errors.CheckpointError(what, file=where, tensor=name, found=errors.shortened(pattern.text))
            if not missing and name not in units:
                units[name] = tuple(tensors[one] for one in wanted)
                used.append((pattern, parts))
    return units, list(dict.fromkeys(used))


def _fits(tensor: Tensor) -> bool:
    return tensor.entry.dtype == "BF16" and len(tensor.entry.shape) == 2 and tensor.entry.elements > 0
