"""Decode a whole container into torch tensors."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import xxhash

from df11.formats import errors
from df11.formats.container import Container
from df11.formats.record import Record, Scratch, weights_dtype
from df11.runtime import batches, cpu, gpu, hub
from df11.runtime.kernels import Range

if TYPE_CHECKING:
    import torch

    from df11.runtime.operators import Decoder

SLOTS: Final = 6
READING: Final = 4
SLOT_BYTES: Final = 16 << 20
"""The ring of pinned memory through which a file goes to a GPU, and as much memory there.

Some slots are being read while the others are copied and decoded: one can wait for its decoding during another's copy.
"""

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
    """All tensors of a `.df11` file, decoded, on a device, as ``safetensors.torch.load_file`` loads a safetensors file.

    ``path``: a file, or its address on the Hub: ``hf://owner/name[@revision]/model.df11``. On the CPU, all cores read
    and decode, and the checksums of stored and of decoded bytes are checked. To a GPU, the file goes compressed through
    a ring of pinned memory; all checksums of stored bytes are checked on the way, and the kernels check that each lane
    ends where it should. Raises a :class:`~df11.formats.errors.Df11Error` for damage, too little memory, no usable GPU,
    or a refusal by the Hub.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise errors.missing_extra("torch", "torch") from None
    from df11.runtime import operators

    target = device_of(device)
    decoder = operators.decoder_of(target)  # Before the file is read, as this fails where there is no GPU.
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
    """A torch device by its name. Raises DeviceError if torch knows no such name."""
    import torch

    try:
        return torch.device(device)
    except RuntimeError:
        raise errors.DeviceError(
            "torch knows no such device", expected="'cuda', 'cuda:1', 'cpu', ...", found=repr(device)
        ) from None


def torch_dtype(container: Container, name: str) -> torch.dtype:
    """The torch dtype of a tensor of a container. Raises DtypeError where torch has none."""
    import torch

    found = container.info(name).dtype
    dtype: torch.dtype | None = getattr(torch, _TORCH_NAMES.get(found, ""), None)
    if dtype is None:
        raise errors.DtypeError("torch has no such dtype", file=container.path, tensor=name, found=found)
    return dtype


def load_on_cores(container: Container, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors in CPU memory; each segment and each verbatim tensor is a task for a thread."""
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
                record = container.record(name)
                out = _bytes_of(tensor).numpy().view(weights_dtype(record.kind))
                tasks += [cpu.pool().submit(decode, record, index, out) for index in range(len(record.segments))]
            else:
                tasks.append(cpu.pool().submit(container.read_verbatim, name, _bytes_of(tensor).numpy()))
        for task in tasks:
            task.result()
    finally:
        for task in tasks:  # After an error the file is closed, so nobody may still read from it.
            if not task.cancel():
                task.exception()


def load_through_ring(
    container: Container,
    tensors: dict[str, torch.Tensor],
    device: torch.device,
    decoder: Decoder,
    capacity: int = SLOT_BYTES,
) -> None:
    """Fill tensors on a device: threads read and check batches of the file, which are then copied and decoded there."""
    ring = deque(_Slot(device, capacity) for _ in range(SLOTS))
    reading: deque[tuple[batches.Batch, _Slot, Future[None]]] = deque()
    checksums: dict[str, xxhash.xxh3_64] = {}

    def finish() -> None:
        batch, slot, read = reading.popleft()
        ring.append(slot)
        read.result()
        for part in batch.verbatim:
            checksum = checksums.setdefault(part.name, xxhash.xxh3_64())
            checksum.update(slot.bytes[part.start : part.start + part.size])
            if part.last:
                container.check_verbatim(part.name, checksum.intdigest())
        slot.copy(batch, tensors)
        decoder.decode([slot.range_of(part, tensors[part.name]) for part in batch.records])
        slot.used()

    with _side_stream(device):
        try:
            for batch in batches.cut(container, capacity, tensors):
                if len(reading) == READING:
                    finish()
                slot = ring.popleft()
                slot.prepare(batch.size)
                reading.append((batch, slot, cpu.pool().submit(batch.read, container, slot.bytes[: batch.size])))
            while reading:
                finish()
            decoder.check_errors()
        finally:
            for _, _, read in reading:
                if not read.cancel():
                    read.exception()


class _Slot:
    """A slot of the ring: pinned memory, and as much on the device."""

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
        """Wait until the slot is no longer in use; grow it if a single segment needs that."""
        if self._event is not None:
            self._event.synchronize()
        if size > len(self.bytes):
            self._allocate(size)

    def copy(self, batch: batches.Batch, tensors: dict[str, torch.Tensor]) -> None:
        """Start copying: records to the slot's device memory, verbatim bytes to their tensors."""
        if batch.records:
            end = batch.records[-1].start + batch.records[-1].size
            self._staging[:end].copy_(self._pinned[:end], non_blocking=True)
        for part in batch.verbatim:
            target = _bytes_of(tensors[part.name])[part.offset : part.offset + part.size]
            target.copy_(self._pinned[part.start : part.start + part.size], non_blocking=True)

    def range_of(self, part: batches.RecordPart, tensor: torch.Tensor) -> Range:
        """The range that decodes a record of the batch into its tensor."""
        return Range(
            self._staging.data_ptr() + part.start,
            part.size,
            part.elements,
            part.segment_elements,
            0,
            part.elements,
            tensor.data_ptr() + part.kind.bytes * part.first_element,
            kind=part.kind,
        )

    def used(self) -> None:
        """Record that all work with the slot has been launched."""
        if self._event is not None:
            self._event.record()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    # A stream of our own, so that the caller's work continues; at the end the caller's stream waits for it.
    import torch

    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:  # After an error too: launched work still uses memory that is about to be freed.
        torch.cuda.current_stream(device).wait_stream(stream)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(-1).view(torch.uint8)
