"""Decode a whole container into torch tensors."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from df11.formats import errors
from df11.formats.container import Container
from df11.formats.record import Record, Scratch
from df11.runtime import cpu, gpu, hub, pieces
from df11.runtime.kernels import Range

if TYPE_CHECKING:
    import torch

    from df11.runtime.operators import Decoder

SLOTS: Final = 6
READING: Final = 4
SLOT_BYTES: Final = 16 << 20
"""The ring of pinned memory through which a file goes to a GPU, and as much there. Some slots are being read; the others are being copied and
decoded, so that one can wait for its turn while another's copy is under way."""

_TORCH_NAMES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


def load_file(path: str | os.PathLike[str], device: str | torch.device = "cuda") -> dict[str, torch.Tensor]:
    """All tensors of a `.df11` file, decoded, on a device, as ``safetensors.torch.load_file`` gives those of a safetensors file.

    ``path``: of the file, or its address on the Hub: ``hf://owner/name[@revision]/model.df11``.
    On the processor all cores read and decode, and stored and decoded checksums are checked. To a GPU the file goes compressed, through a
    ring of pinned memory; every stored checksum is checked on the way, and the kernels check that each lane ends where it should.
    Raises a :class:`~df11.formats.errors.Df11Error` for damage, for too little memory, where there is no usable GPU, and for what the Hub refuses.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise errors.missing_extra("torch", "torch") from None
    from df11.runtime import operators

    target = device_of(device)
    decoder = operators.decoder_of(target)  # Before the file is read: it says whether there is a GPU.
    with hub.naming_downloads(), Container(hub.local_file(path)) as container:
        if target.type == "cuda":
            target = gpu.of(target).device  # with its index
        dtypes = {name: torch_dtype(container, name) for name in container.keys()}
        size = sum(container.info(name).elements * dtype.itemsize for name, dtype in dtypes.items())
        with gpu.enough_memory(target, size + 2 * SLOTS * SLOT_BYTES):
            tensors = {
                name: torch.empty(container.info(name).shape, dtype=dtype, device=target)
                for name, dtype in dtypes.items()
            }
            if target.type == "cpu":
                load_on_cores(container, tensors)
            else:
                load_through_ring(container, tensors, target, decoder)
    return tensors


def device_of(device: str | torch.device) -> torch.device:
    """A torch device by its name. Raises DeviceError if there is none of that name."""
    import torch

    try:
        return torch.device(device)
    except RuntimeError:
        raise errors.DeviceError(
            "torch knows no such device", expected="'cuda', 'cuda:1', 'cpu', ...", found=repr(device)
        ) from None


def torch_dtype(container: Container, name: str) -> torch.dtype:
    """The dtype that a tensor of a container has in torch. Raises DtypeError where torch has none."""
    import torch

    found = container.info(name).dtype
    dtype: torch.dtype | None = getattr(torch, _TORCH_NAMES.get(found, ""), None)
    if dtype is None:
        raise errors.DtypeError("torch has no such dtype", file=container.path, tensor=name, found=found)
    return dtype


def load_on_cores(container: Container, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in the processor's memory: each segment, and each verbatim tensor, is a task for some core."""
    import torch

    scratch = threading.local()

    def decode(record: Record, index: int, out: Any) -> None:
        if not hasattr(scratch, "memory"):
            scratch.memory = Scratch()
        entry = record.segments[index]
        record.read_segment(index, scratch.memory).decode(
            out[entry.first_element : entry.first_element + entry.elements]
        )

    tasks: list[Future[None]] = []
    try:
        for name, tensor in tensors.items():
            cpu.use_large_pages(tensor.data_ptr(), tensor.nbytes)
            if container.info(name).encoding == "df11":
                record, out = container.record(name), tensor.view(-1).view(torch.int16).numpy().view(np.uint16)
                tasks += [cpu.pool().submit(decode, record, index, out) for index in range(len(record.segments))]
            else:
                tasks.append(cpu.pool().submit(container.read_verbatim, name, _bytes_of(tensor).numpy()))
        for task in tasks:
            task.result()
    finally:
        for task in tasks:  # The file is closed after an error; nobody may still read from it.
            if not task.cancel():
                task.exception()


def load_through_ring(
    container: Container,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
    decoder: Decoder,
    capacity: int = SLOT_BYTES,
) -> None:
    """Fill tensors in a device's memory: threads read and check pieces of the file, which are copied and decoded there in turn."""
    ring = deque(_Slot(device, capacity) for _ in range(SLOTS))
    reading: deque[tuple[pieces.Piece, _Slot, Future[None]]] = deque()
    checksums: dict[str, xxhash.xxh3_64] = {}

    def finish() -> None:
        piece, slot, read = reading.popleft()
        ring.append(slot)
        read.result()
        for part in piece.verbatim:
            checksum = checksums.setdefault(part.name, xxhash.xxh3_64())
            checksum.update(slot.bytes[part.start : part.start + part.size])
            if part.last:
                container.check_verbatim(part.name, checksum.intdigest())
        slot.copy(piece, tensors)
        decoder.decode([slot.range_of(part, tensors[part.name]) for part in piece.records])
        slot.used()

    with _side_stream(device):
        try:
            for piece in pieces.cut(container, capacity):
                if len(reading) == READING:
                    finish()
                slot = ring.popleft()
                slot.prepare(piece.size)
                reading.append((piece, slot, cpu.pool().submit(piece.read, container, slot.bytes[: piece.size])))
            while reading:
                finish()
            decoder.raise_damage()
        finally:
            for _, _, read in reading:
                if not read.cancel():
                    read.exception()


class _Slot:
    """A place of the ring: pinned memory, and as much on the device."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        import torch

        self._device = device
        self._event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        import torch

        self._pinned = torch.empty(capacity, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._staging = torch.empty(capacity, dtype=torch.uint8, device=self._device)
        self.bytes = self._pinned.numpy()

    def prepare(self, size: int) -> None:
        """Wait until the slot is no longer in use; make it larger if a single segment asks for it."""
        if self._event is not None:
            self._event.synchronize()
        if size > len(self.bytes):
            self._allocate(size)

    def copy(self, piece: pieces.Piece, tensors: dict[str, torch.Tensor]) -> None:
        """Start copying: records to the device's half of the slot, verbatim bytes to their tensors."""
        if piece.records:
            end = piece.records[-1].start + piece.records[-1].size
            self._staging[:end].copy_(self._pinned[:end], non_blocking=True)
        for part in piece.verbatim:
            target = _bytes_of(tensors[part.name])[part.offset : part.offset + part.size]
            target.copy_(self._pinned[part.start : part.start + part.size], non_blocking=True)

    def range_of(self, part: pieces.RecordPart, tensor: torch.Tensor) -> Range:
        """What decodes a record of the piece into its tensor."""
        return Range(
            self._staging.data_ptr() + part.start,
            part.size,
            part.elements,
            part.segment_elements,
            0,
            part.elements,
            tensor.data_ptr() + 2 * part.first_element,
        )

    def used(self) -> None:
        """Note that all work with the slot has been launched."""
        if self._event is not None:
            self._event.record()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    # A stream of our own, so that the caller's work goes on; at the end his stream waits for it.
    import torch

    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:  # After an error, too: what has been launched still uses memory that is about to be given back.
        torch.cuda.current_stream(device).wait_stream(stream)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)
