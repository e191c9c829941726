"""What the compilers make of the CUDA kernels: registers, spills, occupancy, instructions per weight. Needs no GPU.

``python -m benchmarks.gpu.cubins`` compiles the kernels with NVRTC for each architecture, as the runtime does, and
disassembles the result. Needs the wheels ``nvidia-cuda-nvrtc-cu12`` (or, with ``--nvrtc 13``, ``nvidia-cuda-nvrtc``)
and ``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from benchmarks.results import table
from df11.formats import layout
from df11.runtime import kernels

NVRTC_WHEELS: Final = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}
NVDISASM_WHEEL: Final = "nvidia-cuda-nvdisasm"

_INSTRUCTION: Final = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL: Final = re.compile(r"([.$\w]+):")


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What the blocks on a multiprocessor share besides its 65536 registers: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS: Final = {
    "80": Multiprocessor(64, 32, 164 << 10),
    "86": Multiprocessor(48, 16, 100 << 10),
    "89": Multiprocessor(48, 24, 100 << 10),
    "90": Multiprocessor(64, 32, 228 << 10),
    "100": Multiprocessor(64, 32, 228 << 10),
    "120": Multiprocessor(48, 24, 100 << 10),
}
"""By architecture. The limits and the rules of ``blocks_per_sm`` are those of NVIDIA's cuda_occupancy.h (CUDA 13.0)."""

ARCHITECTURES: Final = tuple(MULTIPROCESSORS)
MOST_THREADS: Final = 1024
"""Threads per block if a kernel has no launch bound."""


class MissingWheelError(RuntimeError):
    """A wheel is not installed, or lacks the file needed."""


class CompileError(RuntimeError):
    """NVRTC failed, or its output is not understood; the text is its log."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """``guard``: the predicate that guards its execution, or "". ``opcode``: with its suffixes."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".", 1)[0]

    def __str__(self) -> str:
        return f"{self.guard:>6} {self.opcode} {self.operands}".rstrip()


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions counted in the body of a loop.

    ``wide_stores``: of 8 weights of FP8, in 64 bits, or of 128 bits, which are 8 weights of BF16 and F16, or 4 of F32;
    ``weights``: how many they are.

    The body is all that can be executed between two arrivals at the loop's head, rare branches included. So
    ``instructions`` is an upper bound, if ``calls`` is 0 and every branch stores as often.
    """

    instructions: int
    shared_loads: int
    global_loads: int
    global_stores: int
    wide_stores: int
    weights: int
    calls: int
    listing: tuple[str, ...]

    @property
    def instructions_per_weight(self) -> float:
        """Instructions that a lane executes per weight."""
        return self.instructions / self.weights


@dataclass(slots=True)
class Function:
    """A kernel. ``max_threads``: threads per block by its launch bound, 0 without one.

    ``labels``: the index of the instruction after each.
    """

    max_threads: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory, which holds spilled registers and arrays."""
        return _count(self.code, "LDL", "STL")

    def hot_loop(self, kind: layout.Kind = layout.BF16) -> Loop | None:
        """The decoding loop: the innermost loop with look-ups in shared memory that has the most wide stores."""
        loops = [(body, _measure([self.code[i] for i in sorted(body)], kind)) for body in self.loops()]
        candidates = [(body, loop) for body, loop in loops if loop.wide_stores and loop.shared_loads]
        innermost = [loop for body, loop in candidates if not any(other < body for other, _ in candidates)]
        return max(innermost, key=lambda loop: (loop.wide_stores, -loop.global_stores, loop.instructions), default=None)

    def loops(self) -> list[set[int]]:
        """The indices of the instructions of each natural loop; loops with the same head count as one.

        A range of addresses would not do: compilers put rare code after the function and jump back into the loop.
        """
        successors = [self._successors(i) for i in range(len(self.code))]
        predecessors: list[list[int]] = [[] for _ in self.code]
        reached, waiting = {0}, [0]
        while waiting:
            i = waiting.pop()
            for j in successors[i]:
                predecessors[j].append(i)
                if j not in reached:
                    reached.add(j)
                    waiting.append(j)
        dominators = _dominators(sorted(reached), predecessors)
        bodies: dict[int, set[int]] = {}
        for tail in sorted(reached):
            for head in successors[tail]:
                if dominators[tail] >> head & 1:
                    body = bodies.setdefault(head, {head})
                    waiting = [tail]
                    while waiting:
                        i = waiting.pop()
                        if i not in body:
                            body.add(i)
                            waiting += predecessors[i]
        return list(bodies.values())

    def _successors(self, i: int) -> list[int]:
        instruction = self.code[i]
        following = [i + 1] if i + 1 < len(self.code) else []
        if instruction.name in {"EXIT", "RET"}:
            return following if instruction.guard else []
        # BRA.DIV handles a warp that has diverged before a shuffle or vote: a detour that a loop without such branches
        # never takes.
        if instruction.name not in {"BRA", "BRX", "JMP", "JMX"} or instruction.opcode.startswith("BRA.DIV"):
            return following
        targets = [self.labels[word] for word in re.findall(r"[.$\w]+", instruction.operands) if word in self.labels]
        if not targets:
            raise CompileError(f"not understood: {instruction}")
        always = not instruction.guard and (
            instruction.name in {"BRX", "JMX"} or re.fullmatch(r"`\([.$\w]+\)", instruction.operands)
        )
        return targets if always else targets + following


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One compiled kernel.

    ``registers``: per thread. ``spill_stores``, ``spill_loads``, ``stack_bytes``: bytes per thread, including called
    functions. ``shared_bytes``: static, per block. ``threads``: per block, the launch bound if there is one.
    ``local_accesses``: instructions that access local memory. ``loop``: the decoding loop, or None. ``blocks_per_sm``,
    ``warps_per_sm``: the most that are resident at once.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    local_accesses: int
    loop: Loop | None
    blocks_per_sm: int
    warps_per_sm: int


@dataclass(frozen=True, slots=True)
class CompiledCubin:
    """A compiled source: architecture ("80"), machine code, compiler log, disassembly, a report per kernel by name."""

    architecture: str
    cubin: bytes
    log: str
    sass: str
    kernels: dict[str, KernelReport]


def compile_kernels(
    source: str, architecture: str, nvrtc: Path | None = None, kind: layout.Kind = layout.BF16
) -> CompiledCubin:
    """Compile CUDA C++ for an architecture ("80") and records of a kind, and analyze the result.

    ``nvrtc``: the library, as from ``nvrtc_library``; None stands for that of CUDA 12.
    """
    cubin, log = _compile_in_child(source, architecture, nvrtc or nvrtc_library(12), kind)
    listing = disassemble(cubin)
    functions = parse(listing)
    reports = [_report(part, functions, architecture, kind) for part in log.split("Compiling entry function '")[1:]]
    if not reports:
        raise CompileError(f"no kernel in the log:\n{log}")
    return CompiledCubin(architecture, cubin, log, listing, {report.name: report for report in reports})


def _compile_in_child(source: str, architecture: str, nvrtc: Path, kind: layout.Kind) -> tuple[bytes, str]:
    # NVRTC 12.9 crashes on a kernel for sm_120 that runs out of registers, and would take pytest with it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(compile_cubin, source, architecture, nvrtc, kind).result()
        except BrokenProcessPool:
            raise CompileError(f"{nvrtc.name} crashes on this source for sm_{architecture}") from None


def compile_cubin(source: str, architecture: str, nvrtc: Path, kind: layout.Kind) -> tuple[bytes, str]:
    """The machine code and the log, which holds the output of ptxas -v."""
    more = ("--ptxas-options=-v", f"--gpu-architecture=sm_{architecture}")
    return _compile(source, (*kernels.nvrtc_options(kind), *more), nvrtc, "CUBIN")


def compile_ptx(source: str, architecture: str, nvrtc: Path, kind: layout.Kind = layout.BF16) -> str:
    """The PTX for a virtual architecture ("80")."""
    options = (*kernels.nvrtc_options(kind), f"--gpu-architecture=compute_{architecture}")
    return _compile(source, options, nvrtc, "PTX")[0].rstrip(b"\0").decode()


def _compile(source: str, options: tuple[str, ...], nvrtc: Path, result: str) -> tuple[bytes, str]:
    for builtins in nvrtc.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC opens it by name; that of CUDA 13.0 does not look in its own folder.
    library = ctypes.CDLL(str(nvrtc))
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode.cu", 0, None, None))
    try:
        encoded = [option.encode() for option in options]
        status = library.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status:
            raise CompileError(f"NVRTC error {status}, {options[-1]}:\n{log}")
        return _read(library[f"nvrtcGet{result}Size"], library[f"nvrtcGet{result}"], program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(get(program, data))
    return data.raw


def _check(status: int) -> None:
    if status:
        raise CompileError(f"NVRTC error {status}")


def disassemble(cubin: bytes) -> str:
    """The disassembly by nvdisasm."""
    program = _wheel_file(NVDISASM_WHEEL, r"nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        return subprocess.run([program, path], capture_output=True, text=True, check=True).stdout


def nvrtc_library(major: int) -> Path:
    """NVRTC of CUDA 12 or 13, from its wheel."""
    return _wheel_file(NVRTC_WHEELS[major], r"libnvrtc\.so\.\d+")


def _wheel_file(wheel: str, pattern: str) -> Path:
    try:
        files = metadata.files(wheel) or []
    except metadata.PackageNotFoundError:
        raise MissingWheelError(f"needs {wheel}: pip install {wheel}") from None
    paths = (Path(str(file.locate())) for file in files if re.fullmatch(pattern, file.name))
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise MissingWheelError(
            f"{wheel} {metadata.version(wheel)} has no {pattern}: pip install --force-reinstall {wheel}"
        )
    return found


def _report(log: str, functions: dict[str, Function], architecture: str, kind: layout.Kind) -> KernelReport:
    """The report of one kernel, from the disassembly and its part of the log, which begins with the name."""
    name = log.split("'", 1)[0]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers(.*)", log)
    if not frames or not used or name not in functions:
        raise CompileError(f"{name}: not understood:\n{log}")
    stack_bytes, spill_stores, spill_loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    shared = re.search(r"(\d+) bytes smem", used[2])
    shared_bytes = int(shared[1]) if shared else 0
    function = functions[name]
    threads = function.max_threads or MOST_THREADS
    blocks = blocks_per_sm(architecture, int(used[1]), shared_bytes, threads)
    return KernelReport(
        name=name,
        registers=int(used[1]),
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        threads=threads,
        local_accesses=function.local_accesses,
        loop=function.hot_loop(kind),
        blocks_per_sm=blocks,
        warps_per_sm=blocks * -(-threads // 32),
    )


def blocks_per_sm(architecture: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks that fit on a multiprocessor at once, with at most one barrier each and the most shared memory configured.

    ``registers``: per thread; ``shared_bytes``, ``threads``: per block.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    # Each of the four partitions has a quarter of the registers, which are allocated to warps in units of 256.
    warps_by_registers = 4 * (16384 // _round_up(32 * registers, 256))
    by_shared = limits.shared_bytes // _round_up(shared_bytes + 1024, 128)  # 1 KiB per block is reserved by the system
    return min(limits.blocks, limits.warps // warps, warps_by_registers // warps, by_shared)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def parse(listing: str) -> dict[str, Function]:
    """The kernels in an nvdisasm listing by name; the functions they call stand at the end of their code."""
    sections = re.split(r"^\s*\.section\s+", listing, flags=re.MULTILINE)
    functions = {
        match[1]: _parse_code(section) for section in sections if (match := re.match(r"\.text\.([^,]+),", section))
    }
    for section in sections:
        info = re.match(r"\.nv\.info\.([^,]+),.*EIATTR_MAX_THREADS(.*?)(?:EIATTR_|$)", section, flags=re.DOTALL)
        if info and info[1] in functions:
            functions[info[1]].max_threads = math.prod(
                int(word, 16) for word in re.findall(r"\.word\s+(0x[0-9a-f]+)", info[2])
            )
    return functions


def _parse_code(section: str) -> Function:
    function = Function()
    for line in section.splitlines():
        if instruction := _INSTRUCTION.match(line):
            function.code.append(Instruction((instruction[1] or "").strip(), instruction[2], instruction[3]))
        elif label := _LABEL.match(line):
            function.labels[label[1]] = len(function.code)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            raise CompileError(f"not understood: {line}")
    return function


def _dominators(reached: list[int], predecessors: list[list[int]]) -> dict[int, int]:
    """For each instruction, those that are always executed before it, and itself, as a set of bits."""
    everything = (1 << len(predecessors)) - 1
    dominators = dict.fromkeys(reached, everything)
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for i in reached[1:]:
            common = everything
            for j in predecessors[i]:
                common &= dominators[j]
            if dominators[i] != common | 1 << i:
                dominators[i] = common | 1 << i
                changed = True
    return dominators


def _measure(code: list[Instruction], kind: layout.Kind) -> Loop:
    width = min(64 * kind.bytes, 128)
    wide_stores = sum(
        instruction.name in {"STG", "ST"} and str(width) in instruction.opcode.split(".") for instruction in code
    )
    return Loop(
        instructions=len(code),
        shared_loads=_count(code, "LDS"),
        global_loads=_count(code, "LDG", "LD", "LDGSTS"),
        global_stores=_count(code, "STG", "ST"),
        wide_stores=wide_stores,
        weights=wide_stores * width // (8 * kind.bytes),
        calls=_count(code, "CALL"),
        listing=tuple(map(str, code)),
    )


def _count(code: list[Instruction], *names: str) -> int:
    return sum(instruction.name in names for instruction in code)


_HEAD: Final = (
    *("kernel", "sm", "registers", "spilled", "stack", "local", "shared", "threads", "blocks/SM", "warps/SM"),
    *("loop", "LDS", "LDG", "STG", "wide", "calls", "per weight"),
)


def _row(architecture: str, kernel: KernelReport) -> list[str]:
    spilled = kernel.spill_stores + kernel.spill_loads
    numbers = [
        kernel.registers,
        spilled,
        kernel.stack_bytes,
        kernel.local_accesses,
        kernel.shared_bytes,
        kernel.threads,
    ]
    row = [kernel.name, architecture, *map(str, [*numbers, kernel.blocks_per_sm, kernel.warps_per_sm])]
    if loop := kernel.loop:
        counts = [
            loop.instructions,
            loop.shared_loads,
            loop.global_loads,
            loop.global_stores,
            loop.wide_stores,
            loop.calls,
        ]
        return [*row, *map(str, counts), f"{loop.instructions_per_weight:.2f}"]
    return row + ["-"] * (len(_HEAD) - len(row))


def main() -> None:
    """Print a row per kernel and architecture."""
    parser = argparse.ArgumentParser(description="What NVRTC makes of the CUDA kernels.")
    parser.add_argument("--nvrtc", type=int, choices=NVRTC_WHEELS, default=12, help="CUDA's major version; default: 12")
    parser.add_argument(
        "--sm", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="architectures; default: all"
    )
    parser.add_argument("--dtype", choices=layout.KINDS, default="BF16", help="of the records; default: BF16")
    parser.add_argument("--loops", action="store_true", help="also print the instructions of the loops")
    chosen = parser.parse_args()
    source = kernels.SOURCE.read_text(encoding="utf-8")
    reports: list[tuple[str, KernelReport]] = []
    errors = []
    for architecture in chosen.sm:
        try:
            cubin = compile_kernels(source, architecture, nvrtc_library(chosen.nvrtc), layout.KINDS[chosen.dtype])
            reports += [(architecture, kernel) for kernel in cubin.kernels.values()]
        except MissingWheelError as error:
            sys.exit(str(error))
        except CompileError as error:
            errors.append(str(error))
    reports.sort(key=lambda pair: (pair[1].name, int(pair[0])))
    print(table(_HEAD, [_row(*pair) for pair in reports]))
    if chosen.loops:
        for architecture, kernel in reports:
            if kernel.loop:
                print(f"\n{kernel.name}, sm_{architecture}", *kernel.loop.listing, sep="\n")
    sys.exit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
