"""A compressed tensor in device memory: its record, and what it decodes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from df11.formats import errors, layout
from df11.formats.container import Container

if TYPE_CHECKING:
    import torch

    from df11.runtime.operators import Decoder


class CompressedTensor:
    """A BF16 tensor held as a record on a device, decoded on request.

    ``record``: u8, one-dimensional, the record as it is in the file. ``shape``: of the decoded tensor.
    ``segment_elements``: weights per segment of the record (the last may have fewer). On a GPU, decoding is launched on
    torch's current stream. Damaged bytes decode to wrong weights but never cause an access out of bounds;
    :func:`check_errors` reports them.
    """

    def __init__(
        self, record: torch.Tensor, shape: Sequence[int], segment_elements: int = layout.DEFAULT_SEGMENT_WEIGHTS
    ) -> None:
        from df11.runtime import operators

        operators.check_record(record, math.prod(shape), segment_elements)
        self.record = record
        self.shape = tuple(shape)
        self.segment_elements = segment_elements

    @classmethod
    def load(cls, container: Container, name: str, device: str | torch.device = "cuda") -> CompressedTensor:
        """Read a record of an open container, check its checksums, and copy it to a device."""
        import torch

        record = container.record(name)
        if record.kind is not layout.BF16:
            what = "only BF16 is held compressed"
            raise errors.DtypeError(what, file=container.path, tensor=name, found=record.kind.dtype)
        data = torch.from_numpy(record.read_whole())
        return cls(data.to(device), container.info(name).shape, record.segment_elements)

    @property
    def device(self) -> torch.device:
        """The device that holds the record."""
        return self.record.device

    @property
    def elements(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    def to(self, device: str | torch.device) -> CompressedTensor:
        """A copy on another device."""
        return CompressedTensor(self.record.to(device), self.shape, self.segment_elements)

    def decode(self, out: torch.Tensor | None = None, *, background: bool = False) -> torch.Tensor:
        """All weights, BF16 of ``shape``; written to ``out`` (contiguous BF16, as many weights) if given.

        ``background`` selects the kernel with few registers and little shared memory, which can run beside others on a
        side stream.
        """
        from df11.runtime import operators

        if out is None:
            decoded: torch.Tensor = operators.decode(self.record, list(self.shape), self.segment_elements, background)
            return decoded
        decode_many([self], [out], background=background)
        return out

    def rows(self, start: int, stop: int, *, background: bool = False) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension. Tiles outside of them are not decoded."""
        from df11.runtime import operators

        decoded: torch.Tensor = operators.decode_rows(
            self.record, list(self.shape), self.segment_elements, start, stop, background
        )
        return decoded

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows with the indices ``ids`` (i64 or i32, any shape, on the same device), as for an embedding."""
        from df11.runtime import operators

        decoded: torch.Tensor = operators.gather_rows(self.record, list(self.shape), self.segment_elements, ids)
        return decoded


def decode_many(
    tensors: Sequence[CompressedTensor], out: Sequence[torch.Tensor] | None = None, *, background: bool = False
) -> list[torch.Tensor]:
    """Decode several tensors of one device at once, such as all matrices of a transformer block.

    A launch takes 64 of them, so that small ones keep the GPU busy. ``out``: a contiguous BF16 tensor for each, with as
    many weights; allocated if not given.
    """
    import torch

    from df11.runtime import operators

    outputs = (
        list(out) if out is not None else [torch.empty(t.shape, dtype=torch.bfloat16, device=t.device) for t in tensors]
    )
    if [output.numel() for output in outputs] != [tensor.elements for tensor in tensors]:
        raise errors.UsageError(
            "the outputs have other sizes than the tensors",
            expected=[t.elements for t in tensors],
            found=[o.numel() for o in outputs],
        )
    operators.decode_into(
        [tensor.record for tensor in tensors],
        [tensor.elements for tensor in tensors],
        [tensor.segment_elements for tensor in tensors],
        [0] * len(tensors),
        outputs,
        background,
    )
    return outputs


def check_errors(device: str | torch.device = "cuda") -> None:
    """Wait for the current stream; raise a Df11Error if a kernel met damaged bytes or a row index out of range.

    On the CPU, decoding itself raises at once.
    """
    decoder(device).check_errors()


def warm_up(device: str | torch.device = "cuda") -> None:
    """Compile or load the kernels of a device now rather than at first use, which a CUDA graph cannot capture."""
    decoder(device)


def decoder(device: str | torch.device) -> Decoder:
    """The decoder of a device."""
    from df11.runtime import load, operators

    return operators.decoder_of(load.device_of(device))


__all__ = ["CompressedTensor", "check_errors", "decode_many", "warm_up"]
