"""nvCOMP's ANS as a peer, through the C interface of version 6.

The library comes from the wheel nvidia-libnvcomp-cu13 (or -cu12; 30 MB, no dependencies). The C interface is its
fastest: compressed chunks and their sizes are already on the GPU, and the call launches its kernel without waiting, so
a CUDA graph can hold it. (The Python package parses headers, has to synchronize unless it is told everything, and needs
a second wheel.) Decompression is told the data type and the number of states and trusts its input; each is documented
to be faster.

Two ways to store weights:

* ``split``: exponents as bytes by ANS, sign/mantissa bytes as they are. ``decompress`` gives the exponents alone, which
  a model cannot use yet; ``interleave`` joins the two. Report both: alone, and together.
* ``whole``: nvCOMP's mode for 16-bit floating-point numbers, on the weights as they are; ``decompress`` gives BF16.

Confirmed without a GPU: the functions that only compute (sizes, alignments) take these structures by value, return what
is documented for each data type and number of states, and refuse others.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.timing import MissingPeerError, cupy_stream

PACKAGES: Final = ("nvidia-libnvcomp-cu13", "nvidia-libnvcomp-cu12")
MAJOR: Final = 6
CHUNK_BYTES: Final = 1 << 16
"""What nvCOMP recommends."""
ALIGNMENT: Final = 16

_UCHAR: Final = 1  # NVCOMP_TYPE_UCHAR
_FLOAT16: Final = 10  # NVCOMP_TYPE_FLOAT16: any 16-bit floating-point format
_STATES: Final = 2  # what 0, the default, stands for in the compressor
_THREADS: Final = 256
_JOINED: Final = 8  # weights per thread

# Each thread joins 8 exponents and 8 sign/mantissa bytes to 8 weights.
SOURCE: Final = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 pair(u32 exponents, u32 others) {
    const u32 e = exponents & 0xFF | (exponents & 0xFF00) << 8;
    const u32 o = others & 0xFF | (others & 0xFF00) << 8;
    return (o & 0x00800080) << 8 | e << 7 | o & 0x007F007F;
}

extern "C" __global__ void interleave(const u8* __restrict__ exponents, const u8* __restrict__ others,
                                      u16* __restrict__ out, u64 weights) {
    const u64 first = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first + 8 <= weights) {
        const uint2 e = *(const uint2*)(exponents + first);
        const uint2 o = *(const uint2*)(others + first);
        *(uint4*)(out + first) =
            make_uint4(pair(e.x, o.x), pair(e.x >> 16, o.x >> 16), pair(e.y, o.y), pair(e.y >> 16, o.y >> 16));
    } else {
        for (u64 i = first; i < weights; ++i) out[i] = (u16)pair(exponents[i], others[i]);
    }
}
"""


class _CompressOptions(ctypes.Structure):
    # nvcompBatchedANSCompressOpts_t
    _fields_ = (
        ("type", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("histogram_reduction_log2", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


class _DecompressOptions(ctypes.Structure):
    # nvcompBatchedANSDecompressOpts_t
    _fields_ = (
        ("backend", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("skip_validate", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


_SIZE, _POINTER = ctypes.c_size_t, ctypes.c_void_p
_SIZE_OUT: Final = ctypes.POINTER(ctypes.c_size_t)
_SIGNATURES: Final[dict[str, list[Any]]] = {
    "nvcompGetProperties": [ctypes.POINTER(ctypes.c_uint32 * 2)],
    "nvcompBatchedANSCompressGetMaxOutputChunkSize": [_SIZE, _CompressOptions, _SIZE_OUT],
    "nvcompBatchedANSCompressGetTempSize": [_SIZE, _SIZE, _CompressOptions, _SIZE_OUT, _SIZE, _POINTER],
    "nvcompBatchedANSCompressAsync": [
        *(_POINTER, _POINTER, _SIZE, _SIZE),  # chunks, their sizes, the largest size, number of chunks
        *(_POINTER, _SIZE, _POINTER, _POINTER),  # scratch memory, its size, compressed chunks, their sizes
        *(_CompressOptions, _POINTER, _POINTER),  # statuses, stream
    ],
    "nvcompBatchedANSDecompressGetTempSize": [_SIZE, _SIZE, _DecompressOptions, _SIZE_OUT, _SIZE, _POINTER],
    "nvcompBatchedANSDecompressAsync": [
        *(
            _POINTER,
            _POINTER,
            _POINTER,
            _POINTER,
            _SIZE,
        ),  # compressed chunks, their sizes, output sizes, sizes found, number of chunks
        *(_POINTER, _SIZE, _POINTER),  # scratch memory, its size, outputs
        *(_DecompressOptions, _POINTER, _POINTER),  # statuses, stream
    ],
}


class NvcompError(RuntimeError):
    """A call failed, or a chunk could not be compressed or decompressed."""


@dataclass(frozen=True, slots=True)
class CompressedAns:
    """Bytes compressed in chunks, on the GPU.

    ``packed``: torch.uint8, one chunk after another, each aligned to 16 bytes. ``addresses``, ``sizes``,
    ``output_sizes``: torch.int64 [chunks], of the chunks and of their contents in bytes. ``size``: bytes of all
    contents. ``data_type``: nvCOMP's number.
    """

    packed: Any
    addresses: Any
    sizes: Any
    output_sizes: Any
    chunk_bytes: int
    size: int
    data_type: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where chunks are decompressed to.

    ``out``, torch.uint8 [size]; the addresses of its chunks; scratch memory; sizes and statuses by chunk.
    """

    out: Any
    addresses: Any
    scratch: Any
    found_sizes: Any
    statuses: Any


class Ans:
    """nvCOMP's ANS on a device (a torch device, its index or name).

    ``library``: libnvcomp.so.6; None stands for that of the wheel. Raises MissingPeerError, which says in one line what
    is missing.
    """

    def __init__(self, device: Any = "cuda", library: Path | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        if chunk_bytes % ALIGNMENT:
            raise ValueError(f"chunks must be multiples of {ALIGNMENT} bytes, not {chunk_bytes}")
        self._library, self.version = load_library(library)
        self._torch: Any = importlib.import_module("torch")
        self._cupy: Any = importlib.import_module("cupy")
        device = self._torch.device(device)
        self.device: Any = self._torch.device(
            "cuda", self._torch.cuda.current_device() if device.index is None else device.index
        )
        self.chunk_bytes = chunk_bytes
        self._interleave: Any = self._cupy.RawKernel(SOURCE, "interleave")

    def whole(self, weights: Any) -> CompressedAns:
        """Compress torch.bfloat16 weights as 16-bit floating-point numbers."""
        return self._compress(weights.contiguous().reshape(-1).view(self._torch.uint8), _FLOAT16)

    def split(self, weights: Any) -> tuple[CompressedAns, Any]:
        """Split torch.bfloat16 weights: the exponents, compressed, and the sign/mantissa bytes, torch.uint8 [n]."""
        bits = weights.contiguous().reshape(-1).view(self._torch.int16)
        exponents = ((bits >> 7) & 0xFF).to(self._torch.uint8)
        return self._compress(exponents, _UCHAR), ((bits >> 8) & 0x80 | bits & 0x7F).to(self._torch.uint8)

    def target(self, compressed: CompressedAns, out: Any = None) -> Target:
        """What ``decompress`` needs besides the chunks.

        ``out``: torch.uint8 [size], aligned to 16 bytes; allocated if not given.
        """
        torch = self._torch
        if out is None:
            out = torch.empty(compressed.size, dtype=torch.uint8, device=self.device)
        if (
            out.numel() != compressed.size
            or out.dtype != torch.uint8
            or not out.is_contiguous()
            or out.data_ptr() % ALIGNMENT
        ):
            raise ValueError(
                f"the output must have {compressed.size} bytes, contiguous and aligned to {ALIGNMENT} bytes"
            )
        chunks = len(compressed.sizes)
        scratch = ctypes.c_size_t()
        arguments = (
            chunks,
            compressed.chunk_bytes,
            _decompress_options(compressed.data_type),
            ctypes.byref(scratch),
            compressed.size,
            None,
        )
        self._call("nvcompBatchedANSDecompressGetTempSize", *arguments)
        return Target(
            out=out,
            addresses=self._addresses(out, compressed.chunk_bytes, chunks),
            scratch=torch.empty(max(1, scratch.value), dtype=torch.uint8, device=self.device),
            found_sizes=torch.zeros(chunks, dtype=torch.int64, device=self.device),
            statuses=torch.full((chunks,), -1, dtype=torch.int32, device=self.device),
        )

    def decompress(self, compressed: CompressedAns, target: Target) -> None:
        """Start decompressing to ``target.out`` on torch's current stream; does not wait."""
        self._call(
            "nvcompBatchedANSDecompressAsync",
            *(
                compressed.addresses.data_ptr(),
                compressed.sizes.data_ptr(),
                compressed.output_sizes.data_ptr(),
                target.found_sizes.data_ptr(),
            ),
            *(len(compressed.sizes), target.scratch.data_ptr(), target.scratch.numel(), target.addresses.data_ptr()),
            *(_decompress_options(compressed.data_type), target.statuses.data_ptr()),
            self._torch.cuda.current_stream(self.device).cuda_stream,
        )

    def interleave(self, exponents: Any, sign_mantissa: Any, out: Any) -> None:
        """Join torch.uint8 exponents and sign/mantissa bytes to torch.bfloat16 weights on torch's current stream.

        Does not wait.
        """
        weights = out.numel()
        blocks = -(-weights // (_JOINED * _THREADS))
        arguments = (exponents.data_ptr(), sign_mantissa.data_ptr(), out.data_ptr(), weights)
        with self._cupy.cuda.Device(self.device.index), cupy_stream(self.device):
            self._interleave((blocks,), (_THREADS,), arguments)

    def _compress(self, data: Any, data_type: int) -> CompressedAns:
        torch, size = self._torch, data.numel()
        if data.data_ptr() % ALIGNMENT:
            data = data.clone()
        starts = range(0, size, self.chunk_bytes)
        sizes = torch.tensor(
            [min(self.chunk_bytes, size - start) for start in starts], dtype=torch.int64, device=self.device
        )
        options = _CompressOptions(data_type=data_type, states_per_lane=_STATES)
        most, scratch_bytes = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("nvcompBatchedANSCompressGetMaxOutputChunkSize", self.chunk_bytes, options, ctypes.byref(most))
        self._call(
            "nvcompBatchedANSCompressGetTempSize",
            len(sizes),
            self.chunk_bytes,
            options,
            ctypes.byref(scratch_bytes),
            size,
            None,
        )
        slot = -(-most.value // ALIGNMENT) * ALIGNMENT
        slots = torch.empty(slot * len(sizes), dtype=torch.uint8, device=self.device)
        scratch = torch.empty(max(1, scratch_bytes.value), dtype=torch.uint8, device=self.device)
        written = torch.zeros_like(sizes)
        statuses = torch.full((len(sizes),), -1, dtype=torch.int32, device=self.device)
        sources, targets = self._addresses(data, self.chunk_bytes, len(sizes)), self._addresses(slots, slot, len(sizes))
        self._call(
            "nvcompBatchedANSCompressAsync",
            *(sources.data_ptr(), sizes.data_ptr(), self.chunk_bytes, len(sizes), scratch.data_ptr(), scratch.numel()),
            *(targets.data_ptr(), written.data_ptr(), options, statuses.data_ptr()),
            self._torch.cuda.current_stream(self.device).cuda_stream,
        )
        if bad := int((statuses != 0).sum()):  # waits
            raise NvcompError(
                f"{bad} of {len(sizes)} chunks were not compressed, status {int(statuses[statuses != 0][0])}"
            )
        rooms = (written + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = rooms.cumsum(0)
        packed = torch.cat([slots[slot * i : slot * i + room] for i, room in enumerate(rooms.tolist())])
        return CompressedAns(
            packed, packed.data_ptr() + ends - rooms, written, sizes, self.chunk_bytes, size, data_type
        )

    def _addresses(self, buffer: Any, step: int, count: int) -> Any:
        return buffer.data_ptr() + step * self._torch.arange(count, dtype=self._torch.int64, device=self.device)

    def _call(self, name: str, *arguments: Any) -> None:
        with self._torch.cuda.device(self.device):
            if status := getattr(self._library, name)(*arguments):
                raise NvcompError(f"{name}: status {status}")


def _decompress_options(data_type: int) -> _DecompressOptions:
    return _DecompressOptions(data_type=data_type, states_per_lane=_STATES, skip_validate=1)


def load_library(path: Path | None = None) -> tuple[ctypes.CDLL, str]:
    """The library with its functions declared, and its version. Needs no GPU."""
    path = path or _installed()
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise MissingPeerError(f"nvCOMP: {error}") from error
    properties = (ctypes.c_uint32 * 2)()  # versions of nvCOMP, as 1000 major + 100 minor + patch, and of CUDA
    status = library.nvcompGetProperties(ctypes.byref(properties))
    major, rest = divmod(properties[0], 1000)
    version = f"{major}.{rest // 100}.{rest % 100}"
    if status or major != MAJOR:
        raise MissingPeerError(f"nvCOMP: version {version}, but only {MAJOR} is supported here")
    return library, version


def _installed() -> Path:
    for package in PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(rf"libnvcomp\.so\.{MAJOR}", file.name):
                return Path(str(file.locate()))
    raise MissingPeerError(f"nvCOMP: not installed (pip install {PACKAGES[0]})")
