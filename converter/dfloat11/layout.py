"""A checkpoint in DFloat11's layout: its config.json and the headers of its files, checked; nothing is decoded yet.

docs/dfloat11.md describes the layout. A **unit** is six tensors that hold the weights of one or more linear layers, or
of an embedding, laid end to end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from df11.converter.dfloat11.architectures import known_parts, known_shape, tied_units
from df11.converter.dfloat11.patterns import Budget, Pattern
from df11.converter.settings import BASE_MEMORY, HEADER_MEMORY, SMALL_HEADER, too_little_memory
from df11.converter.source import Source
from df11.formats import errors, framing, json_text
from df11.storage.entry import Entry
from df11.storage.file import File

AGAIN: Final = "download it again; if that does not help, the checkpoint is damaged"
NOT_LOADED: Final = "DFloat11's own loader could not load it either"
CONFIG_KEY: Final = "dfloat11_config"
CODES: Final = "encoded_exponent"
PARTS: Final[Mapping[str, str]] = {
    "luts": "U8",
    CODES: "U8",
    "sign_mantissa": "U8",
    "output_positions": "U8",
    "gaps": "U8",
    "split_positions": "I64",
}
"""The tensors of a unit, and their dtypes."""
THREADS: Final = 512
"""Threads of a block, in every published checkpoint."""
THREAD_BYTES: Final = 8
"""Bytes of code that a thread decodes."""
MOST_ROWS: Final = 18
"""Rows of luts: 17 tables, and the lengths."""
MOST_PARTS: Final = 1024
MOST_PATTERNS: Final = 1024
MOST_VALUES: Final = 100_000
"""JSON values of config.json."""
_ATTRIBUTES: Final = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Config:
    """What config.json says: all of it, and what is DFloat11's."""

    document: Mapping[str, Any]
    threads: int
    patterns: tuple[tuple[Pattern, tuple[str, ...]], ...] | None
    """None if there is no config.json, for a file alone."""


ALONE: Final = Config({}, THREADS, None)
"""For a file without a config.json."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file of the checkpoint."""

    file: Entry
    entry: framing.Entry
    start: int
    """Its first byte in the file."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit whose sizes have been checked against each other."""

    name: str
    threads: int
    places: Mapping[str, Place]
    parts: tuple[framing.Entry, ...]
    """The BF16 tensors that it holds; ``start`` and ``end`` in bytes of the decoded unit."""
    label: str
    """The file in messages."""

    @property
    def weights(self) -> int:
        """Weights of all parts."""
        return self.places["sign_mantissa"].entry.size

    @property
    def code_bytes(self) -> int:
        """Bytes of code."""
        return self.places[CODES].entry.size

    @property
    def blocks(self) -> int:
        """Blocks of code."""
        return -(-self.code_bytes // (THREAD_BYTES * self.threads))

    @property
    def block_bytes(self) -> int:
        """Bytes of code in a block."""
        return THREAD_BYTES * self.threads

    @property
    def stored_bytes(self) -> int:
        """Bytes of all six tensors."""
        return sum(place.entry.size for place in self.places.values())

    def problem(self, what: str, *, hint: str = AGAIN, **details: Any) -> errors.CheckpointError:
        """The error for something wrong with it."""
        return errors.CheckpointError(what, file=self.label, tensor=self.name, hint=hint, **details)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Units and plain tensors, each by its name."""

    config: Config
    units: Mapping[str, Unit]
    plain: Mapping[str, Place]


def read_config(data: bytes, where: str) -> Config | None:
    """What config.json says, or None if it is not of a DFloat11 checkpoint. Raises CheckpointError."""
    try:
        document = json_text.parse(
            data, what="config.json", where={"file": where}, error=errors.CheckpointError, values=MOST_VALUES
        )
    except errors.Df11Error:
        if b'"dfloat11_config"' in data:
            raise
        return None
    found = document.get(CONFIG_KEY) if isinstance(document, dict) else None
    if found is None:
        return None

    def need(condition: bool, what: str, value: object) -> None:
        if not condition:
            raise errors.CheckpointError(f"{CONFIG_KEY}: {what}", file=where, found=errors.shortened(repr(value)))

    need(isinstance(found, dict), "not an object", found)
    threads, size, patterns = (found.get(key) for key in ("threads_per_block", "bytes_per_thread", "pattern_dict"))
    is_one = isinstance(threads, list) and len(threads) == 1 and type(threads[0]) is int
    need(is_one and threads[0] in (32, 64, 128, 256, 512, 1024), "threads_per_block must be [32] to [1024]", threads)
    need(type(size) is int and size == THREAD_BYTES, "bytes_per_thread must be 8", size)
    need(isinstance(patterns, dict) and len(patterns) <= MOST_PATTERNS, "pattern_dict is no object, or too large", 0)
    read, budget = [], Budget()
    for text, attributes in patterns.items():
        is_list = isinstance(attributes, list) and len(attributes) <= MOST_PARTS
        need(is_list and all(isinstance(one, str) for one in attributes), "a pattern needs a list of names", text)
        for one in attributes:
            need(_ATTRIBUTES.fullmatch(one) is not None, "not the name of a layer", one)
        need(len({*attributes}) == len(attributes), "a pattern names a layer twice", text)
        read.append((Pattern(text, file=where, budget=budget), tuple(attributes)))
    return Config(document, threads[0], tuple(read))


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by the names of tensors."""


def read_checkpoint(
    files: Sequence[Entry],
    config: Config,
    shapes: Shapes | None,
    open_file: Callable[[Entry], File],
    max_memory: int | None,
) -> Checkpoint:
    """Read the headers of the files of a checkpoint.

    ``shapes``: those of the original model, as far as they are given; None: nobody asks for them, and tensors are flat.

    Raises a Df11Error for whatever breaks a rule of the layout.
    """
    places: dict[str, Place] = {}
    labels: dict[str, str] = {}
    splits: dict[str, tuple[int, ...]] = {}
    size = 0
    for file in files:
        opened = open_file(file)
        with Source(opened, max_memory=max_memory) as source:
            opened.expect(opened.size)  # What comes is small, and lies anywhere.
            size += len(source.header.raw)
            check_headers(size, source, max_memory)
            for entry in source.header.entries:
                if entry.name in places:
                    what = f"this tensor is in {labels[entry.name]}, too"
                    raise errors.CheckpointError(what, file=source.path, tensor=entry.name)
                places[entry.name] = Place(file, entry, source.header.data_start + entry.start)
                labels[entry.name] = source.path
                if entry.name.rpartition(".")[2] == "split_positions":
                    splits[entry.name] = _read_splits(source, entry)
    names = [name.rpartition(".")[0] for name in places if name.rpartition(".")[2] == CODES]
    units, plain = {}, dict(places)
    vectors = {name: place.entry.elements for name, place in places.items() if len(place.entry.shape) == 1}
    for name in names:
        label = labels[joined(name, CODES)]
        own = {part: plain.pop(joined(name, part), None) for part in PARTS}
        missing = [part for part, place in own.items() if place is None]
        if missing:
            what = f"this unit has no {missing[0]}"
            raise errors.CheckpointError(what, file=label, tensor=name)
        found = {part: place for part, place in own.items() if place is not None}
        unit = Unit(name, config.threads, found, (), label)
        _check_sizes(unit)
        cuts = splits[joined(name, "split_positions")]
        parts = list(_cut(unit, _attributes(unit, config, len(cuts) + 1), cuts))
        shaped = tuple(one if shapes is None else _shaped(unit, one, config, shapes, vectors) for one in parts)
        units[name] = Unit(name, config.threads, found, shaped, label)
    lost = [name for name in plain if name.rpartition(".")[2] in PARTS]
    if lost:
        what = f"a part of a unit that has no {CODES}"
        raise errors.CheckpointError(what, file=labels[lost[0]], tensor=lost[0])
    taken: set[str] = {*plain}
    for unit in units.values():
        for part in unit.parts:
            if part.name in taken:
                what = f"its weights {errors.shortened(part.name)} are in the checkpoint twice"
                raise unit.problem(what, hint=NOT_LOADED)
            taken.add(part.name)
    return Checkpoint(config, units, plain)


def check_headers(size: int, source: Source, max_memory: int | None) -> None:
    """Raise a BudgetError if headers of ``size`` bytes, up to that of a source, take more than ``max_memory``."""
    needed = BASE_MEMORY + HEADER_MEMORY * size
    if max_memory is not None and size > SMALL_HEADER and needed > max_memory:
        raise too_little_memory(source.path, needed, max_memory)


def joined(unit: str, part: str) -> str:
    """The name of a part of a unit; the model itself, whose name is empty, may be one."""
    return f"{unit}.{part}" if unit else part


def _read_splits(source: Source, entry: framing.Entry) -> tuple[int, ...]:
    if entry.dtype != "I64" or len(entry.shape) != 1 or entry.elements >= MOST_PARTS:
        what = f"split_positions must be I64, of one dimension and fewer than {MOST_PARTS} numbers"
        raise errors.CheckpointError(what, file=source.path, tensor=entry.name, found=(entry.dtype, entry.shape))
    out = np.empty(entry.size, np.uint8)
    source.read(entry.start, out)
    return tuple(map(int, out.view(np.int64)))


def _check_sizes(unit: Unit) -> None:
    """Raise CheckpointError unless dtypes, shapes and sizes of its tensors fit each other."""
    for part, place in unit.places.items():
        entry = place.entry
        dimensions = 2 if part == "luts" else 1
        if entry.dtype != PARTS[part] or len(entry.shape) != dimensions:
            expected = f"{PARTS[part]} of {dimensions} dimensions"
            raise unit.problem(f"dtype or shape of {part}", expected=expected, found=(entry.dtype, entry.shape))
    rows, width = unit.places["luts"].entry.shape
    if width != 256 or not 2 <= rows <= MOST_ROWS:
        what = "luts must have 256 columns, and 2 to 18 rows: there are 16 pointers to tables besides the first"
        raise unit.problem(what, found=(rows, width))
    weights, size = unit.weights, unit.code_bytes
    if not (0 < weights < 1 << 31 and 0 < size < 1 << 31):
        raise unit.problem("weights and bytes of code must be from 1 to 2^31 - 1", found=(weights, size))
    if not weights <= 8 * size <= 32 * weights + 7:
        what = "the codes of so many weights take another number of bytes"
        raise unit.problem(what, expected=f"{-(-weights // 8)} to {4 * weights}", found=size)
    positions = unit.places["output_positions"].entry.size
    if positions not in (4 * unit.blocks, 4 * (unit.blocks + 1)):
        raise unit.problem("bytes of output_positions", expected=4 * (unit.blocks + 1), found=positions)
    gaps, needed = unit.places["gaps"].entry.size, -(-5 * unit.blocks * unit.threads // 8)
    if gaps < needed:
        raise unit.problem("bytes of gaps", expected=needed, found=gaps)


def _attributes(unit: Unit, config: Config, count: int) -> tuple[str, ...]:
    # What pattern_dict says about a unit of so many parts.
    if config.patterns is None:
        known = known_parts(unit.name, count)
        if known is None and count > 1:
            hint = "put the checkpoint's config.json beside the file"
            raise unit.problem("nothing says which layers this unit has, and no model is known with it", hint=hint)
        return known or ()
    found = {parts: pattern for pattern, parts in config.patterns if pattern.matches(unit.name)}
    if len(found) != 1:
        what = "several patterns of pattern_dict match this unit" if found else "no pattern of pattern_dict matches it"
        raise unit.problem(what, hint=NOT_LOADED)
    parts = next(iter(found))
    if max(len(parts), 1) != count:
        what = "split_positions does not fit pattern_dict"
        raise unit.problem(what, hint=NOT_LOADED, expected=f"{len(parts)} parts", found=count)
    return parts


def _cut(unit: Unit, attributes: Sequence[str], cuts: Sequence[int]) -> Iterator[framing.Entry]:
    ends = [*cuts, unit.weights]
    position = 0
    for attribute, end in zip(attributes or ("",), ends, strict=True):
        if not position < end <= unit.weights:
            raise unit.problem("split_positions must rise within the weights", found=errors.shortened(str(ends)))
        name = joined(joined(unit.name, attribute) if attribute else unit.name, "weight")
        yield framing.Entry(name, "BF16", (end - position,), 2 * position, 2 * end)
        position = end


def _shaped(
    unit: Unit, part: framing.Entry, config: Config, shapes: Shapes, vectors: Mapping[str, int]
) -> framing.Entry:
    # With the shape that the original, a bias, a norm or config.json tells.
    elements = part.elements
    tied = [first for first, second in tied_units(config.document) if second == unit.name]
    rows = vectors.get(part.name.removesuffix("weight") + "bias")
    shape = next((shapes[one] for one in (part.name, *(f"{first}.weight" for first in tied)) if one in shapes), None)
    if shape is None and rows and elements % rows == 0:
        shape = (rows, elements // rows)
    if shape is None:
        attribute = part.name.removesuffix("weight").removeprefix(unit.name).strip(".")
        shape = known_shape(unit.name, attribute, elements, config.document, vectors)
    if shape is None:
        what = f"nothing tells the shape of {errors.shortened(part.name)}"
        hint = "name the original model, whose headers do: --shapes hf://OWNER/NAME, or a file or folder"
        raise unit.problem(what, hint=hint)
    if math.prod(shape) != elements or (rows is not None and shape[0] != rows):
        what = f"the shape of {errors.shortened(part.name)} does not fit"
        expected, hint = f"{elements} weights" + (f", {rows} rows" if rows else ""), "check --shapes, if it was given"
        raise unit.problem(what, hint=hint, expected=expected, found=shape)
    return framing.Entry(part.name, part.dtype, shape, part.start, part.end)
