"""Run the kernels of a CUDA source on the CPU: fast in this process (``Library``), or in another under sanitizers.

The latter is ``run_batch``. A ``Case`` is a launch together with its memory, and runs in both. Behaviour that is
undefined on a GPU raises ``LaunchError`` if it is noticed.

    status = Buffer(np.zeros(1, np.uint32))
    case = Case("kernel", grid=2, block=256, arguments=[np.uint32(7), Address(status)], outputs=[status], seed=1)
    [result] = Library(source, kernels).run(case)            # an array like the one that `status` was made of
    [[result]] = run_batch(source, kernels, [case])"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[2] / "build" / "cuda_on_cpu"
GNU_CXX = "g++"

Array = npt.NDArray[np.generic]

# Kernels access the same bytes through different types, which nvcc allows.
FLAGS = (
    "-std=c++17",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
)
LIBRARY_FLAGS = (*FLAGS, "-O2", "-fPIC", "-shared")
# The section of __shared__ variables: without this, ASan puts nothing between variables in a section of their own.
GUARDED_FLAGS = (
    *(*FLAGS, "-O1", "-fno-omit-frame-pointer", "-DCUDA_ON_CPU_MAIN"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"),
)


class LaunchError(Exception):
    """A launch that went wrong: a line from the emulator or a sanitizer's report. ``case``: its index in the batch."""

    def __init__(self, message: str, case: int | None = None) -> None:
        super().__init__(message)
        self.case = case


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory for a kernel with the bytes of ``content``, at an odd multiple of ``alignment``, a power of two."""

    content: Array
    alignment: int = 16

    def __post_init__(self) -> None:
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(f"an alignment is a power of two, not {self.alignment}")


@dataclass(frozen=True)
class Address:
    """The address of byte ``offset`` of a buffer."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Struct:
    """A structure passed by value: a NumPy scalar or 0-d array, and addresses to put into it, by offset in bytes."""

    value: np.generic | Array
    addresses: Mapping[int, Address] = field(default_factory=dict)


Argument = Address | Struct | np.generic | Array


@dataclass(frozen=True, eq=False)
class Case:
    """One launch. Its buffers are those that the arguments refer to; ``outputs``: those to return, in this order."""

    kernel: str
    grid: int
    block: int
    arguments: Sequence[Argument]
    outputs: Sequence[Buffer] = ()
    seed: int = 0


class Library:
    """The kernels of a source, callable in this process, unguarded: accesses out of bounds and endless loops happen."""

    def __init__(self, source: Path, kernels: Path, options: Sequence[str] = ()) -> None:
        self._library = ctypes.CDLL(str(_build(source, kernels, (*LIBRARY_FLAGS, *options))))
        self._library.cuda_on_cpu_error.restype = ctypes.c_char_p
        self._lock = threading.Lock()  # there is only one set of threads, warps and shared memory

    def launch(self, kernel: str, grid: int, block: int, *arguments: np.generic | Array, seed: int = 0) -> None:
        """Launch with arguments of exactly the parameters' sizes.

        ``np.uint32(1)``, ``np.uint64(address)``, a structured scalar or 0-d array.
        """
        values = [np.array(argument) for argument in arguments]
        sizes = ctypes.POINTER(ctypes.c_uint64)()
        count = self._library.cuda_on_cpu_parameters(kernel.encode(), ctypes.byref(sizes))
        if count < 0:
            raise LaunchError(f"there is no kernel {kernel}")
        given, wanted = [value.nbytes for value in values], sizes[:count]
        if given != wanted:
            raise LaunchError(f"{kernel} wants arguments of {wanted} bytes, got {given}")
        pointers = (ctypes.c_void_p * max(count, 1))(*(value.ctypes.data for value in values))
        with self._lock:
            if self._library.cuda_on_cpu_launch(
                kernel.encode(), ctypes.c_uint(grid), ctypes.c_uint(block), pointers, ctypes.c_uint64(seed)
            ):
                raise LaunchError(self._library.cuda_on_cpu_error().decode())

    def run(self, case: Case) -> list[Array]:
        """The outputs of a case."""
        memory = {buffer: _place(buffer) for buffer in _buffers(case)}
        arguments: list[Array] = []
        for argument in case.arguments:
            value, addresses = _value(argument)
            raw = np.frombuffer(bytearray(value), np.uint8)
            for offset, address in addresses.items():
                raw[offset : offset + 8] = np.array(
                    [memory[address.buffer].ctypes.data + address.offset], np.uint64
                ).view(np.uint8)
            arguments.append(raw)
        self.launch(case.kernel, case.grid, case.block, *arguments, seed=case.seed)
        return [_like(buffer, memory[buffer]) for buffer in case.outputs]


def run_batch(
    source: Path, kernels: Path, cases: Sequence[Case], timeout: float = 60, options: Sequence[str] = ()
) -> list[list[Array]]:
    """The outputs of each case, run under ASan and UBSan with a heap block per buffer.

    ``timeout``: seconds for all. ``options``: more of the compiler's.
    """
    program = _build(source, kernels, (*GUARDED_FLAGS, *options))
    with tempfile.TemporaryDirectory() as folder:
        batch, outputs, report = (Path(folder) / name for name in ("cases", "outputs", "report"))
        with batch.open("wb") as file:
            file.write(struct.pack("=Q", len(cases)))
            for case in cases:
                file.write(_serialize(case))
        options = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16", "UBSAN_OPTIONS": "print_stacktrace=1"}
        with report.open("wb") as file:
            try:
                command = [program, batch, outputs]
                status = subprocess.run(
                    command, stdout=file, stderr=file, env=os.environ | options, timeout=timeout, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        if status != 0:
            text = report.read_text(errors="replace")
            started = re.findall(r"^case (\d+)$", text, re.MULTILINE)
            text = re.sub(r"^case \d+\n", "", text, flags=re.MULTILINE).strip()
            index = int(started[-1]) if started else None
            what = f"took more than {timeout} s" if status is None else f"ended with status {status}"
            name = "the batch" if index is None else f"case {index} ({cases[index].kernel}, seed {cases[index].seed})"
            raise LaunchError(f"{name} {what}\n{text}".strip(), index)
        data, place, results = outputs.read_bytes(), 0, []
        for case in cases:
            found: dict[Buffer, Array] = {}
            for buffer in _buffers(case):
                if buffer in case.outputs:
                    found[buffer] = _like(
                        buffer, np.frombuffer(bytearray(data[place : place + buffer.content.nbytes]), np.uint8)
                    )
                    place += buffer.content.nbytes
            results.append([found[buffer] for buffer in case.outputs])
        return results


def _build(source: Path, kernels: Path, flags: Sequence[str]) -> Path:
    """The library or program for a source, compiled if necessary. ``kernels``: the file that lists the kernels."""
    source, kernels = source.resolve(), kernels.resolve()
    flags = [*flags, f'-DCUDA_ON_CPU_SOURCE="{source}"', f'-DCUDA_ON_CPU_KERNELS="{kernels}"']
    parts = [_compiler().encode(), repr(flags).encode()]
    # Files next to the source count too: it may include them.
    for path in [
        HERE / "driver.cpp",
        HERE / "cuda_on_cpu.h",
        kernels,
        *sorted(source.parent.glob("*.cu")),
        *sorted(source.parent.glob("*.*h")),
    ]:
        parts += [str(path).encode(), path.read_bytes()]
    result = CACHE / f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{result.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Of several workers that want the same, one compiles.
        if result.exists():
            return result
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "made"
            run = subprocess.run(
                [GNU_CXX, *flags, HERE / "driver.cpp", "-o", made], capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{run.stderr}")
            made.replace(result)
    return result


@functools.cache
def _compiler() -> str:
    """The compiler's own description."""
    try:
        return subprocess.run([GNU_CXX, "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise RuntimeError("g++ is needed to run the CUDA sources on the CPU: apt-get install g++") from None


def _value(argument: Argument) -> tuple[bytes, Mapping[int, Address]]:
    """The bytes of an argument, and the addresses to put into it, by offset."""
    if isinstance(argument, Address):
        return bytes(8), {0: argument}
    if isinstance(argument, Struct):
        return argument.value.tobytes(), argument.addresses
    return argument.tobytes(), {}


def _buffers(case: Case) -> list[Buffer]:
    """Every buffer of a case, once."""
    reached = [address.buffer for argument in case.arguments for address in _value(argument)[1].values()]
    return list(dict.fromkeys([*reached, *case.outputs]))


def _serialize(case: Case) -> bytes:
    """A case as read by driver.cpp."""
    buffers = _buffers(case)
    parts: list[bytes] = []

    def numbers(*values: int) -> None:
        parts.append(struct.pack(f"={len(values)}Q", *values))

    def blob(data: bytes) -> None:
        numbers(len(data))
        parts.append(data)

    blob(case.kernel.encode())
    numbers(case.grid, case.block, case.seed, len(buffers))
    for buffer in buffers:
        numbers(buffer.alignment, buffer in case.outputs)
        blob(buffer.content.tobytes())
    numbers(len(case.arguments))
    for argument in case.arguments:
        value, addresses = _value(argument)
        blob(value)
        numbers(len(addresses))
        for offset, address in addresses.items():
            numbers(offset, buffers.index(address.buffer), address.offset)
    return b"".join(parts)


def _place(buffer: Buffer) -> npt.NDArray[np.uint8]:
    """Memory with a buffer's content, at an odd multiple of its alignment."""
    size, alignment = buffer.content.nbytes, buffer.alignment
    room = np.empty(size + 2 * alignment, np.uint8)
    skip = (alignment - room.ctypes.data) % (2 * alignment)
    placed = room[skip : skip + size]
    placed[:] = np.frombuffer(buffer.content.tobytes(), np.uint8)
    return placed


def _like(buffer: Buffer, memory: npt.NDArray[np.uint8]) -> Array:
    """Bytes in the type and shape of the buffer's content."""
    return (
        memory.view(buffer.content.dtype).reshape(buffer.content.shape)
        if memory.size
        else np.empty_like(buffer.content)
    )
