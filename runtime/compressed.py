"""A compressed tensor in the memory of a device: its record, and what it decodes to."""

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
    """A BF16 tensor as a record on a device, decoded when asked.

    ``record``: u8, one-dimensional, the record as it is in the file; ``shape``: of the decoded tensor; ``segment_elements``: weights of each of
    the record's segments but the last. On a GPU, decoding is launched on torch's current stream; bytes that turn out to be damaged
    decode to wrong weights, never to a wrong access, and :func:`raise_damage` tells.
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
        data = torch.from_numpy(record.read_whole())
        return cls(data.to(device), container.info(name).shape, record.segment_elements)

    @property
    def device(self) -> torch.device:
        """Where the record is."""
        return self.record.device

    @property
    def elements(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    def to(self, device: str | torch.device) -> CompressedTensor:
        """The same on another device."""
        return CompressedTensor(self.record.to(device), self.shape, self.segment_elements)

    def decode(self, out: torch.Tensor | None = None, *, background: bool = False) -> torch.Tensor:
        """All weights, BF16 of ``shape``; into ``out`` (contiguous, BF16, as many weights) if it is given.

        ``background`` takes the kernel with few registers and little shared memory, which runs beside others on a side stream.
        """
        from df11.runtime import operators

        if out is None:
            decoded: torch.Tensor = operators.decode(self.record, list(self.shape), self.segment_elements, background)
            return decoded
        decode_many([self], [out], background=background)
        return out

    def rows(self, start: int, stop: int, *, background: bool = False) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (exclusive) of the first dimension, without decoding the tiles that hold none of them."""
        from df11.runtime import operators

        decoded: torch.Tensor = operators.decode_rows(
            self.record, list(self.shape), self.segment_elements, start, stop, background
        )
        return decoded

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows whose numbers are in ``ids`` (i64 or i32, any shape, on the same device), as an embedding gives them."""
        from df11.runtime import operators

        decoded: torch.Tensor = operators.gather_rows(self.record, list(self.shape), self.segment_elements, ids)
        return decoded


def decode_many(
    tensors: Sequence[CompressedTensor], out: Sequence[torch.Tensor] | None = None, *, background: bool = False
) -> list[torch.Tensor]:
    """Decode several tensors of one device at once, such as all matrices of a transformer block: 64 a launch, so that small ones leave no core idle.

    ``out``: a contiguous BF16 tensor for each, with as many weights; made if it is not given.
    """
    import torch

    from df11.runtime import operators

    outputs = (
        list(out) if out is not None else [torch.empty(t.shape, dtype=torch.bfloat16, device=t.device) for t in tensors]
    )
    if [output.numel() for output in outputs] != [tensor.elements for tensor in tensors]:
        raise errors.UsageError(
            "outputs of other sizes", expected=[t.elements for t in tensors], found=[o.numel() for o in outputs]
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


def raise_damage(device: str | torch.device = "cuda") -> None:
    """Wait for what has been launched on the current stream, and raise a Df11Error if a kernel has met damaged bytes or a wrong row number.

    On the processor damage raises at once.
    """
    decoder(device).raise_damage()


def warm_up(device: str | torch.device = "cuda") -> None:
    """Compile or load the kernels of a device now, rather than at the first use: a CUDA graph cannot capture that."""
    decoder(device)


def decoder(device: str | torch.device) -> Decoder:
    """The decoder of a device."""
    from df11.runtime import load, operators

    return operators.decoder_of(load.device_of(device))


__all__ = ["CompressedTensor", "decode_many", "raise_damage", "warm_up"]
