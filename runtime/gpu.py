"""A CUDA device: checks that it is usable, compiles the kernels for it, and launches them.

torch owns memory and streams; CuPy compiles and launches. Both use the device's primary context, and exchange only
addresses.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from df11.formats import errors, layout
from df11.formats.record import weights_dtype
from df11.runtime import kernels
from df11.runtime.kernels import Range, worked

if TYPE_CHECKING:
    import torch

_Functions = dict[str, Any]
"""CuPy's kernels by name."""

_CUPY_BUILDS: Final = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")


class Gpu:
    """The kernels on one CUDA device.

    Launches go to torch's current stream and allocate nothing, so that a CUDA graph can capture them.
    """

    def __init__(self, device: torch.device, source: str | None = None) -> None:
        """Check the device. Nothing is compiled before it is needed: see :meth:`prepare`.

        ``source``: CUDA source to use instead of the package's, for comparisons. Raises DeviceError or
        MissingExtraError.
        """
        import torch

        self.device = device
        check_device(device)
        self._refuse_capture()
        self._cupy = _import_cupy()
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors: int = properties.multi_processor_count
        self._name: str = properties.name
        self._source = source
        self._functions: dict[int, _Functions] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def status(self) -> torch.Tensor:
        """Where kernels note damage: i32 [1]."""
        import torch

        with torch.inference_mode(False):  # Made in inference mode, it could not be reset outside of it.
            return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _refuse_capture(self) -> None:
        import torch

        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise errors.UsageError(
                "the kernels cannot be loaded while a CUDA graph is captured",
                hint="call df11.runtime.warm_up(device, dtype) first",
            )

    def prepare(self, kind: layout.Kind) -> None:
        """Compile the kernels for a kind of records or take them from CuPy's cache, and let each decode a record.

        The driver loads a kernel at its first launch, which must not be within the capture of a graph. Each kind is
        prepared at its first use. Raises DeviceError.
        """
        self._prepared(kind)

    def _prepared(self, kind: layout.Kind) -> _Functions:
        found = self._functions.get(kind.code)
        if found is None:
            self._refuse_capture()
            with self._lock:
                if kind.code not in self._functions:
                    self._functions[kind.code] = self._compiled(kind)
                found = self._functions[kind.code]
        return found

    def _compiled(self, kind: layout.Kind) -> _Functions:
        module = self._cupy.RawModule(
            code=self._source or kernels.SOURCE.read_text(encoding="utf-8"), options=kernels.nvrtc_options(kind)
        )
        try:
            with self._cupy.cuda.Device(self.device.index):
                compiled = {name: module.get_function(name) for name in kernels.THREADS}
                for kernel in compiled.values():
                    kernel.compile()
                # Give shared memory the largest share of the L1 cache, so that the most blocks of the wide kernel fit.
                compiled[kernels.DECODE].preferred_shared_memory_carveout = 100
                functions = {name: kernel.kernel for name, kernel in compiled.items()}
            self._prove(kind, functions)
        except errors.Df11Error:
            raise
        except Exception as error:  # The exceptions of CuPy, NVRTC and the driver have no common base class.
            raise errors.DeviceError(
                f"the kernels do not compile or load on {self._name}: {_first_line(error)}", hint=_remedy(error)
            ) from error
        return functions

    def _prove(self, kind: layout.Kind, functions: _Functions) -> None:
        # Waits for the current stream, so that other streams find a status word of zero.
        import torch

        record = torch.from_numpy(np.frombuffer(worked.RECORDS[kind.dtype], np.uint8).copy()).to(self.device)
        weights = worked.weights(kind)
        expected = torch.from_numpy(np.array(weights, weights_dtype(kind)).view(np.uint8))
        count = len(weights)
        rows = torch.arange(count, device=self.device)
        for name in functions:
            out = torch.zeros(len(expected), dtype=torch.uint8, device=self.device)
            size, segment = len(record), layout.DEFAULT_SEGMENT_WEIGHTS
            whole = Range(record.data_ptr(), size, count, segment, 0, count, out.data_ptr(), kind=kind)
            if name == kernels.GATHER_ROWS:
                self._gather_rows(functions, whole, rows.data_ptr(), count, 1, count)
            else:
                self._decode(functions, name, [whole], None)
            if not torch.equal(out.cpu(), expected) or self.status.item():
                raise errors.DeviceError(
                    f"{name} decodes {kind.dtype} wrongly on {self._name}",
                    hint="use device='cpu', and report this: python -m benchmarks.gpu.check says more",
                )

    def decode(self, ranges: Sequence[Range], *, background: bool = False, tiles_per_block: int | None = None) -> None:
        """Decode ranges, 64 of a kind per launch.

        ``background`` selects the kernel that needs little of a multiprocessor.
        """
        name = kernels.DECODE_SMALL if background else kernels.DECODE
        for kind in {part.kind.code: part.kind for part in ranges}.values():
            same = [part for part in ranges if part.kind is kind]
            self._decode(self._prepared(kind), name, same, tiles_per_block)

    def _decode(self, functions: _Functions, name: str, ranges: Sequence[Range], tiles_per_block: int | None) -> None:
        if tiles_per_block is None:
            tiles_per_block = kernels.tiles_per_block(
                name, sum(layout.tile_count(part.last - part.first) for part in ranges), self.multiprocessors
            )
        for start in range(0, len(ranges), kernels.MOST_RANGES):
            arguments, blocks = kernels.pack(ranges[start : start + kernels.MOST_RANGES], tiles_per_block)
            if blocks:
                self._launch(functions, name, blocks, *arguments, np.uint64(self.status.data_ptr()))

    def gather_rows(self, matrix: Range, ids: int, count: int, row_weights: int, rows: int) -> None:
        """Decode ``count`` rows of a matrix; ``ids`` is the address of their indices, i64.

        ``matrix``: the whole record, with the output of all rows.
        """
        if count and row_weights:
            self._gather_rows(self._prepared(matrix.kind), matrix, ids, count, row_weights, rows)

    def _gather_rows(
        self, functions: _Functions, matrix: Range, ids: int, count: int, row_weights: int, rows: int
    ) -> None:
        arguments = (kernels.pack_one(matrix), np.uint64(ids), np.uint64(row_weights), np.uint64(rows))
        self._launch(functions, kernels.GATHER_ROWS, count, *arguments, np.uint64(self.status.data_ptr()))

    def _launch(self, functions: _Functions, name: str, blocks: int, *arguments: Any) -> None:
        import torch

        # Changing CuPy's device and stream, and back, would cost more than the launch.
        stream = _Stream(torch.cuda.current_stream(self.device).cuda_stream)
        is_current = torch.cuda.current_device() == self.device.index
        with nullcontext() if is_current else self._cupy.cuda.Device(self.device.index):
            functions[name]((blocks,), (kernels.THREADS[name],), arguments, stream=stream)

    def check_errors(self) -> None:
        """Wait for the current stream; raise the error if a kernel has met damaged bytes since the last call."""
        status = int(self.status.item())
        if status:
            self.status.zero_()
        kernels.check_errors(status)


_lock: Final = threading.Lock()
_gpus: Final[dict[int, Gpu]] = {}


def of(device: torch.device) -> Gpu:
    """The kernels on a CUDA device."""
    import torch

    index: int | None = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    with _lock:
        if index not in _gpus:
            _gpus[index] = Gpu(torch.device("cuda", index))
        return _gpus[index]


def check_device(device: torch.device) -> None:
    """Raise a DeviceError that says why this device cannot be used, if so."""
    import torch

    if torch.version.cuda is None:
        raise errors.DeviceError(
            f"this torch ({torch.__version__}) is built without CUDA",
            hint="install a CUDA build of torch, or use device='cpu'",
        )
    if not torch.cuda.is_available():
        raise errors.DeviceError("torch finds no CUDA GPU or no driver", hint="check nvidia-smi, or use device='cpu'")
    if (device.index or 0) >= torch.cuda.device_count():
        raise errors.DeviceError(
            f"there is no device {device}", expected=f"an index below {torch.cuda.device_count()}", found=device.index
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < kernels.OLDEST_CAPABILITY:
        raise errors.DeviceError(
            f"{torch.cuda.get_device_name(device)} is too old",
            expected=f"compute capability {_dotted(kernels.OLDEST_CAPABILITY)} or higher",
            found=_dotted(capability),
            hint="use device='cpu'",
        )


@dataclass(frozen=True, slots=True)
class _Stream:
    # A stream of torch, as CuPy's launches take it.
    ptr: int


def _import_cupy() -> Any:
    installed = [name for name in _CUPY_BUILDS if _is_installed(name)]
    if len(installed) > 1:
        raise errors.DeviceError(
            f"several builds of CuPy are installed: {', '.join(installed)}", hint="uninstall all but one with pip"
        )
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        raise errors.missing_extra("cupy", _extra()) from None
    except ImportError as error:
        raise errors.DeviceError(
            f"CuPy cannot be imported: {_first_line(error)}", hint="reinstall the build that fits your CUDA"
        ) from error
    return cupy


def _extra() -> str:
    # The one that fits the CUDA of this torch.
    import torch

    return "cuda13" if (torch.version.cuda or "").startswith("13") else "cuda12"


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _remedy(error: BaseException) -> str:
    # CuPy includes headers of CUDA in whatever it compiles, and NVRTC opens a second library by its name.
    message, wheel = str(error), f"'cupy-{_extra()}x[ctk]>=14'"
    if "open source file" in message:
        return f"CuPy finds no headers of CUDA: pip install {wheel}, or set CUDA_PATH to a toolkit"
    if "builtins" in message:
        return f"NVRTC finds no libnvrtc-builtins: pip install {wheel}, or put its folder on LD_LIBRARY_PATH"
    return "update the driver, or NVRTC (12.8 or newer for compute capability 10.0 and above) and CuPy"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


@contextmanager
def enough_memory(device: torch.device, needed: int) -> Iterator[None]:
    """Turn torch's out-of-memory errors into a BudgetError with ``needed`` bytes and, on a GPU, the free memory."""
    import torch

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        raise errors.BudgetError(
            f"too little memory on {device}",
            expected=f"{needed:,} bytes",
            found=f"{free:,} free" if free is not None else None,
        ) from error
