"""Containers, records and safetensors headers: read as users read them, and by the reference decoder, too."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors

import df11
from df11.converter.inspect import as_text, describe
from df11.converter.restore_file import restore_file, restored_layout
from df11.formats import errors, framing, layout, reference
from df11.formats.container import NUMPY_DTYPES, Container
from df11.formats.record import Bytes, Place, open_record
from tests.fuzz.edits import edit_bytes, edit_json, edit_json_text, edit_text, number
from tests.fuzz.oracle import Fault, Target
from tests.fuzz.segments import edit_record, new_record
from tests.vectors import forge, generate

LARGEST_SEED = 9000
"""Bytes of a golden file that is a seed: the reference decoder takes a second for some hundred thousand."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="df11-fuzz-")


def in_a_file(data: bytes, name: str) -> Path:
    """The path of a file with these bytes; the next call for the same name reuses it."""
    path = Path(_folder().name) / name
    path.write_bytes(data)
    return path


# Reading.


def _restored(container: Container) -> bytes:
    parts: list[bytes] = []
    restore_file(container, restored_layout(container, bf16=True), lambda data: parts.append(data.tobytes()), 1, _none)
    return b"".join(parts)


def _none(_: int) -> None:
    pass


def _tensors(container: Container) -> dict[str, bytes]:
    return {name: container.tensor(name).tobytes() for name in container.keys()}


def read_container(data: bytes) -> None:
    """Everything that a user can do with a file."""
    path = in_a_file(data, "a.df11")
    with Container(path) as container:
        description = describe(container)
        if any(not line.isprintable() for line in as_text(description).split("\n")):
            raise Fault("df11 inspect prints control characters")
        json.dumps(description)
        tensors = _tensors(container)
        for name, whole in tensors.items():
            info = container.info(name)
            if info.shape and info.elements and info.dtype in NUMPY_DTYPES:
                row = container.rows(name, info.shape[0] // 2, info.shape[0]).tobytes()
                if row != whole[len(whole) - len(row) :]:
                    raise Fault(f"rows of {name!r} differ from the tensor")
        restored = _restored(container)
        rounded = any(container.info(name).exact is False for name in tensors)
        if not rounded and hashlib.sha256(restored).hexdigest() != container.source.sha256:
            raise Fault("what was restored does not have the SHA-256 of the source")
    if df11.verify(path, threads=1).tensors != len(tensors):
        raise Fault("df11 verify counts other tensors")


def compare_decoders(data: bytes) -> None:
    """The container must accept what the reference decoder accepts, and decode the same bytes."""
    path = in_a_file(data, "b.df11")
    tensors = refusal = None
    try:
        with Container(path) as container:
            tensors = _tensors(container)
            _restored(container)
    except errors.Df11Error as error:
        refusal = error

    def expected() -> dict[str, bytes]:
        known = reference.open_file(data)
        decoded = {name: reference.decode_tensor(known, name) for name in known.entries}
        reference.restore_file(known)
        return decoded

    _compare(tensors, refusal, expected)


def _compare(found: object, refusal: errors.Df11Error | None, expected: Callable[[], object]) -> None:
    # Both decoders accept the same, and give the same. Raises the refusal that they agree on.
    try:
        wanted = expected()
    except errors.FormatError as error:
        if refusal is None:
            raise Fault(f"only the reference decoder refuses it: {error}") from None
        raise refusal from None
    if refusal is not None:
        raise Fault(f"the reference decoder accepts it: {refusal}")
    if found != wanted:
        raise Fault("the decoders give other bytes")


def read_record(data: bytes) -> None:
    """A record alone, by both decoders."""
    stored = np.frombuffer(data, np.uint8)

    def read(offset: int, out: Bytes) -> None:
        out[:] = stored[offset : offset + len(out)]

    decoded = refusal = None
    try:
        record = open_record(read, len(data), Place())
        decoded = record.decode().tobytes()
        middle = record.element_count // 2
        if record.decode(middle).tobytes() != decoded[record.kind.bytes * middle :]:
            raise Fault("a range of weights differs from the record")
    except errors.Df11Error as error:
        refusal = error
    kind = layout.KINDS_BY_CODE.get(int.from_bytes(data[5:6], "little"), layout.BF16)
    _compare(decoded, refusal, lambda: reference.decode_record(data, None, kind.dtype))


def convert_source(data: bytes) -> None:
    """A safetensors file: whatever is accepted can be converted, restored, and read by safetensors itself."""
    size = framing.header_length(data[:8], len(data), "a")
    framing.parse_header(data[8 : 8 + size], len(data) - 8 - size, "a")
    try:
        safetensors.deserialize(data)
    except Exception as error:
        if "number out of range" not in str(error):  # In a member that is ignored: RFC 8259 leaves the range open.
            raise Fault(f"safetensors refuses it: {error}") from None
    source = in_a_file(data, "c.safetensors")
    target, back = source.with_suffix(".df11"), source.with_suffix(".back")
    target.unlink(missing_ok=True)
    back.unlink(missing_ok=True)
    df11.convert(source, target, threads=1)
    df11.restore(target, back, threads=1)
    if back.read_bytes() != data:
        raise Fault("the restored file is another one")


# Edits.


@dataclass
class _Parts:
    # A container taken apart. ``data``: the bytes of each entry.
    document: dict[str, Any]
    data: dict[str, bytes]

    def built(self) -> bytes:
        at = 0
        for name, stored in self.data.items():
            self.document[name]["data_offsets"] = [at, at + len(stored)]
            at += len(stored)
        return forge.with_header(_json(self.document), b"".join(self.data.values()))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _taken_apart(file: bytes) -> _Parts:
    header, data = forge.split(file)
    document = json.loads(header)
    entries = [(*document[name]["data_offsets"], name) for name in document if name != "__metadata__"]
    return _Parts(document, {name: data[start:end] for start, end, name in sorted(entries)})


def _edit_stored(parts: _Parts, random: Random) -> None:
    # The bytes of a tensor, and every number that must fit them.
    name = random.choice(list(parts.data))
    with forge.json_value(parts.document, "df11.tensors") as tensors:
        tensor = tensors[name]
        if tensor["encoding"] == "df11":
            fresh = random.random() < 0.2
            stored = new_record(random) if fresh else edit_record(parts.data[name], random)
            parts.document[name]["shape"] = [len(stored)]
            if fresh:
                tensor["shape"] = [int.from_bytes(stored[8:16], "little")]
        else:
            stored = bytearray(parts.data[name])
            for _ in range(random.randrange(4)):
                if stored:
                    stored[random.randrange(len(stored))] = random.randrange(256)
            tensor["xxh3"] = f"{forge.xxh3(bytes(stored)):016x}"
        parts.data[name] = bytes(stored)


def _edit_source_header(parts: _Parts, random: Random) -> None:
    metadata = parts.document["__metadata__"]
    raw = _unpacked(metadata["df11.source_header"])
    raw = edit_text(raw, random) if random.random() < 0.3 else edit_json_text(raw, random)
    frame = forge.raw_frame(raw)
    if random.random() < 0.15:
        frame = edit_bytes(frame, random)
    elif random.random() < 0.15:
        frame = forge.padded_frame(raw, len(raw) + random.choice((1, 1000, 1 << 20, 8 << 20)))
    metadata["df11.source_header"] = base64.b64encode(frame).decode()
    with forge.json_value(parts.document, "df11.source") as source:
        source["bytes"] += len(raw) - source["header_bytes"]
        source["header_bytes"] = len(raw)


def _unpacked(text: str) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompress(base64.b64decode(text), max_output_size=1 << 24)


def _rename(parts: _Parts, random: Random) -> None:
    # A tensor in all three places, or away from all.
    old, new = random.choice(list(parts.data)), random.choice((None, "b", "weight", "\n", "é", "x" * 300))
    metadata = parts.document["__metadata__"]
    raw = json.loads(_unpacked(metadata["df11.source_header"]))
    with forge.json_value(parts.document, "df11.tensors") as tensors:
        for place in (parts.document, parts.data, tensors, raw):
            value = place.pop(old)
            if new is not None:
                place[new] = value
    header = _json(raw)
    metadata["df11.source_header"] = base64.b64encode(forge.raw_frame(header)).decode()
    with forge.json_value(parts.document, "df11.source") as source:
        source["bytes"] += len(header) - source["header_bytes"]
        source["header_bytes"] = len(header)


def _edit_value(parts: _Parts, random: Random) -> None:
    # JSON that is the value of a key.
    key = random.choice(("df11.tensors", "df11.tensors", "df11.source", "df11.requires"))
    text = edit_json_text(parts.document["__metadata__"][key].encode(), random)
    if random.random() < 0.2:
        text = edit_text(text, random)
    parts.document["__metadata__"][key] = text.decode("utf-8", "replace")


def edit_container(file: bytes, random: Random) -> bytes:
    """A container with some edits; sizes, checksums and the SHA-256 made right, most often."""
    try:
        for _ in range(random.choice((1, 1, 2, 3))):
            file = _edit_container(file, random)
        return with_sha256(file) if random.random() < 0.5 else file
    except Exception:  # It no longer has the structure.
        return edit_bytes(file, random)


def _edit_container(file: bytes, random: Random) -> bytes:
    parts = _taken_apart(file)
    structured: list[Callable[[_Parts, Random], None]] = [_edit_stored] * 4
    structured += [_edit_source_header, _edit_source_header, _rename, _edit_value, _edit_value]
    kind = random.randrange(12)
    if kind < 9:
        random.choice(structured)(parts, random)
        return parts.built()
    header, data = forge.split(file)
    if kind == 9:  # The JSON header, entries and all.
        document = edit_json(parts.document, random)
        return forge.with_header(_json(document), data, random.choice((64, 64, 1)))
    if kind == 10:
        return forge.with_header(edit_text(header, random), data)
    whole = bytearray(file)
    whole[:8] = number(random, len(header)).to_bytes(8, "little") if random.random() < 0.3 else whole[:8]
    return edit_bytes(bytes(whole), random)


def with_sha256(file: bytes) -> bytes:
    """The container with the SHA-256 of what it restores to; the same if it is refused before that."""
    try:
        with Container(in_a_file(file, "d.df11")) as container:
            _restored(container)
    except errors.DifferenceError as error:
        parts = _taken_apart(file)
        with forge.json_value(parts.document, "df11.source") as source:
            source["sha256"] = error.found
        return parts.built()
    except errors.Df11Error:
        pass
    return file


def edit_source(file: bytes, random: Random) -> bytes:
    """A safetensors file with an edited header."""
    try:
        header, data = forge.split(file)
        if random.random() < 0.3:
            header = edit_text(header, random)
        else:
            header = edit_json_text(header, random) + b" " * random.choice((0, 0, 3, 8))
    except IndexError:
        return edit_bytes(file, random)
    if random.random() < 0.2:
        data = edit_bytes(data, random)
    return len(header).to_bytes(8, "little") + header + data


# Seeds.


@functools.cache
def _golden() -> list[bytes]:
    names = (path for path in sorted(generate.stored()) if path.startswith("golden/") and path.endswith(".df11"))
    return [file for file in map(generate.read, names) if len(file) < LARGEST_SEED]


def _records() -> list[bytes]:
    return [new_record(Random(seed)) for seed in range(30)]


def _sources() -> list[bytes]:
    tensors = [
        forge.bf16("w", list(range(0x3F00, 0x3F90)), None, (12, 12)),
        forge.Tensor("e", "F32", (0, 3), b""),
        forge.Tensor("s", "I64", (), bytes(8)),
        forge.Tensor("f", "F4", (3, 4), bytes(6)),
    ]
    files = []
    for metadata, padding in ((None, 0), ({"format": "pt"}, 5)):
        header, data = forge.safetensors_file(tensors, metadata, padding)
        files.append(len(header).to_bytes(8, "little") + header + data)
    return files


CONTAINER = Target("container", _golden, edit_container, read_container, 32 << 10)
DECODERS = Target("decoders", _golden, edit_container, compare_decoders, 12 << 10)
RECORD = Target("record", _records, edit_record, read_record, 24 << 10)
SOURCE = Target("source", _sources, edit_source, convert_source, 8 << 10)
