"""What the compilers make of the CUDA kernels, without a GPU; and benchmarks/gpu/cubins.py must notice bad results."""

import functools
import os
from dataclasses import dataclass

import pytest

from benchmarks.gpu import cubins
from df11.formats import layout
from df11.runtime import kernels


@dataclass(frozen=True)
class Bounds:
    """The most a kernel may use on any architecture and, by architecture, the fewest blocks per multiprocessor."""

    registers: int
    shared_bytes: int
    instructions_per_weight: float
    blocks_per_sm: dict[str, int]


SMALL_BLOCKS = {"80": 8, "86": 5, "89": 5, "90": 8, "100": 8, "120": 5}
BOUNDS = {
    kernels.DECODE: Bounds(128, 48 << 10, 4.75, {"80": 3, "86": 2, "89": 2, "90": 4, "100": 4, "120": 2}),
    kernels.DECODE_SMALL: Bounds(64, 17 << 10, 5.5, SMALL_BLOCKS),
    kernels.GATHER_ROWS: Bounds(64, 17 << 10, 5.5, SMALL_BLOCKS),
}

# Of the other dtypes, on two architectures: the oldest, and the one with the fewest registers per thread to be had.
OTHER_BLOCKS = {"80": 3, "120": 2}
OTHER_LOOPS = {layout.F16: 8, layout.F32: 9, layout.F8_E4M3: 5.5, layout.F8_E5M2: 6.5}

ON_ALL = pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)


@functools.cache
def compile_runtime(architecture: str, cuda: int) -> cubins.CompiledCubin:
    source = kernels.SOURCE.read_text(encoding="utf-8")
    return cubins.compile_kernels(source, architecture, cubins.nvrtc_library(cuda))


@pytest.mark.parametrize("architecture", OTHER_BLOCKS)
@pytest.mark.parametrize("kind", OTHER_LOOPS, ids=lambda kind: kind.dtype)
def test_kernels_of_other_dtypes_keep_their_bounds(kind, architecture):
    source = kernels.SOURCE.read_text(encoding="utf-8")
    compiled = cubins.compile_kernels(source, architecture, kind=kind).kernels
    assert compiled.keys() == BOUNDS.keys()
    for name, kernel in compiled.items():
        is_wide = name == kernels.DECODE
        assert (kernel.spill_stores, kernel.spill_loads, kernel.stack_bytes, kernel.local_accesses) == (0, 0, 0, 0)
        assert kernel.registers <= (96 if is_wide else 80)
        assert kernel.shared_bytes <= BOUNDS[name].shared_bytes
        assert kernel.threads == kernels.THREADS[name]
        assert kernel.blocks_per_sm >= (OTHER_BLOCKS[architecture] if is_wide else 5)
        assert kernel.loop is not None
        assert kernel.loop.calls == 0
        assert kernel.loop.instructions_per_weight <= OTHER_LOOPS[kind] + (0 if is_wide else 1.5)


@functools.cache
def compile_toys(source: str, architecture: str) -> dict[str, cubins.KernelReport]:
    return cubins.compile_kernels(source, architecture).kernels


@ON_ALL
@pytest.mark.parametrize("name", BOUNDS)
def test_kernels_keep_their_bounds(architecture, name):
    kernel = compile_runtime(architecture, 12).kernels[name]
    bounds = BOUNDS[name]
    assert (kernel.spill_stores, kernel.spill_loads, kernel.stack_bytes, kernel.local_accesses) == (0, 0, 0, 0)
    assert kernel.registers <= bounds.registers
    assert kernel.shared_bytes <= bounds.shared_bytes
    assert kernel.threads == kernels.THREADS[name]
    assert kernel.blocks_per_sm >= bounds.blocks_per_sm[architecture]
    assert kernel.loop is not None
    assert kernel.loop.calls == 0
    assert kernel.loop.instructions_per_weight <= bounds.instructions_per_weight


@ON_ALL
@pytest.mark.parametrize("cuda", cubins.NVRTC_WHEELS)
def test_every_kernel_compiles_and_has_bounds(architecture, cuda):
    assert compile_runtime(architecture, cuda).kernels.keys() == BOUNDS.keys()


@ON_ALL
@pytest.mark.parametrize("cuda", cubins.NVRTC_WHEELS)
def test_the_first_bytes_are_loaded_while_the_stage_fills(architecture, cuda):
    code = cubins.parse(compile_runtime(architecture, cuda).sass)[kernels.DECODE].code
    loads = [i for i, found in enumerate(code) if found.name == "LDG" and ".EF" in found.opcode]
    wait = next(i for i in range(loads[0], len(code)) if code[i].name == "DEPBAR")
    assert len(loads) == 8  # Of the first group of chunks, and of the next ones within the loop.
    assert loads[3] < wait < loads[4]


SPILLING = """
extern "C" __global__ void __launch_bounds__(THREADS) sums(const unsigned* in, unsigned* out, unsigned n) {
    unsigned a[72];
    #pragma unroll
    for (int i = 0; i < 72; i++) a[i] = in[i * n + threadIdx.x];
    for (unsigned k = 0; k < n; k++)
        #pragma unroll
        for (int i = 0; i < 72; i++) a[i] = a[i] * a[(i + 7) % 72] + k;
    #pragma unroll
    for (int i = 0; i < 72; i++) out[i * n + threadIdx.x] = a[i];
}
"""

INDEXED = """
extern "C" __global__ void indexed(const unsigned* in, unsigned* out) {
    unsigned a[32] = {};
    for (int i = 0; i < 32; i++) a[in[i] % 32] += i;
    out[threadIdx.x] = a[threadIdx.x];
}
"""


@ON_ALL
def test_spills_are_seen(architecture):
    spilling = compile_toys(SPILLING.replace("THREADS", "1024"), architecture)["sums"]
    assert min(spilling.spill_stores, spilling.spill_loads, spilling.stack_bytes, spilling.local_accesses) > 0
    assert (spilling.registers, spilling.threads) == (64, 1024)
    roomy = compile_toys(SPILLING.replace("THREADS", "128"), architecture)["sums"]
    assert (roomy.spill_stores, roomy.spill_loads, roomy.stack_bytes, roomy.local_accesses) == (0, 0, 0, 0)
    assert (roomy.registers > 72, roomy.threads) == (True, 128)


def test_arrays_in_local_memory_are_seen():
    kernel = compile_toys(INDEXED, "80")["indexed"]
    assert kernel.spill_stores == kernel.spill_loads == 0
    assert kernel.stack_bytes == 128
    assert kernel.local_accesses > 0


LOOPS = """
__device__ __forceinline__ uint4 look_up(const unsigned* table, unsigned& state) {
    uint4 v;
    v.x = table[state & 4095], state = state >> 3 ^ v.x;
    v.y = table[state & 4095], state = state >> 3 ^ v.y;
    v.z = table[state & 4095], state = state >> 3 ^ v.z;
    v.w = table[state & 4095], state = state >> 3 ^ v.w;
    return v;
}

extern "C" __global__ void decode(const unsigned* source, uint4* out, unsigned n) {
    __shared__ unsigned table[4096];
    for (unsigned i = threadIdx.x; i < 4096; i += blockDim.x) table[i] = source[i];
    __syncthreads();
    unsigned state = threadIdx.x;
    #pragma unroll 1
    for (unsigned outer = 0; outer < n; outer++) {
        out += 32 * n;
        #pragma unroll 1
        for (unsigned k = 0; k < n; k++) {
            out += 32;
            state += source[k];
            #pragma unroll
            for (int i = 0; i < STORES; i++) STORE(out + 1024 * i, look_up(table, state));
        }
        out[0] = look_up(table, state);
    }
}

extern "C" __global__ void copy(const uint4* in, uint4* out, unsigned n) {
    for (unsigned i = threadIdx.x; i < n; i += 32) out[i] = in[i];
}
"""


@ON_ALL
@pytest.mark.parametrize(
    ("stores", "store"), [(1, "#define STORE(p, v) *(p) = (v)"), (3, "#define STORE(p, v) __stcs(p, v)")]
)
def test_the_inner_loop_is_found_and_counted(architecture, stores, store):
    toys = compile_toys(f"{store}\n{LOOPS.replace('STORES', str(stores))}", architecture)
    loop = toys["decode"].loop
    assert loop is not None
    assert (loop.wide_stores, loop.global_stores, loop.shared_loads, loop.global_loads, loop.calls) == (
        stores,
        stores,
        4 * stores,
        1,
        0,
    )
    # A look-up takes at least a mask, a load, a shift and an exclusive or; the last two may be one instruction.
    assert 3 * 4 * stores < loop.instructions < 8 * 4 * stores + 20
    assert loop.instructions_per_weight == loop.instructions / (8 * stores)
    assert toys["decode"].shared_bytes == 16384
    assert toys["copy"].loop is None


def listing(*lines: str) -> str:
    """As printed by nvdisasm: labels end with a colon."""
    code = "".join(
        line + "\n" if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;\n"
        for i, line in enumerate(lines)
    )
    return f'\t.section\t.text.toy,"ax",@progbits\n\t.align\t128\ntoy:\n{code}'


ROUND = ["LDS R4, [R5]", "STG.E.128 desc[UR4][R2.64], R4"]


def test_rare_code_behind_the_function_belongs_to_the_loop():
    text = listing(
        *(
            "S2R R0, SR_TID.X",
            ".L_1:",
            *ROUND,
            "@P1 BRA `(.L_3)",
            ".L_2:",
            "IADD3 R2, R2, 0x1, RZ",
            "@!P0 BRA `(.L_1)",
            "EXIT",
        ),
        *(".L_3:", "LDG.E R7, [R8.64]", "STG.E [R8.64], R7", "BRA `(.L_2)", ".L_4:", "BRA `(.L_4)", "NOP", "NOP"),
    )
    function = cubins.parse(text)["toy"]
    assert [len(body) for body in function.loops()] == [8]
    loop = function.hot_loop()
    assert loop is not None
    assert (loop.instructions, loop.shared_loads, loop.global_loads, loop.global_stores, loop.wide_stores) == (
        8,
        1,
        1,
        2,
        1,
    )
    assert loop.instructions_per_weight == 8 / 8
    assert "LDG.E R7, [R8.64]" in [line.strip() for line in loop.listing]


def test_the_detour_of_lanes_that_came_apart_does_not_belong_to_the_loop():
    text = listing(
        *(
            ".L_1:",
            *ROUND,
            "BRA.DIV UR4, `(.L_3)",
            "SHFL.IDX PT, R1, R2, R3, R4",
            ".L_2:",
            "BRA.U UP0, `(.L_1)",
            "EXIT",
        ),
        *(".L_3:", "WARPSYNC.COLLECTIVE R6, `(.L_4)", ".L_4:", "SHFL.IDX PT, R1, R2, R3, R4", "BRA `(.L_2)"),
    )
    assert [len(body) for body in cubins.parse(text)["toy"].loops()] == [5]


def test_of_nested_loops_the_inner_one_counts_and_of_others_the_one_that_stores_most():
    inner = [".L_2:", *ROUND, "@P0 BRA `(.L_2)"]
    text = listing(
        ".L_1:",
        "NOP",
        *inner,
        *ROUND,
        *ROUND,
        "@P1 BRA `(.L_1)",
        ".L_3:",
        *ROUND,
        ROUND[1],
        "@P2 BRA P3, `(.L_3)",
        "EXIT",
    )
    function = cubins.parse(text)["toy"]
    assert sorted(len(body) for body in function.loops()) == [3, 4, 9]
    loop = function.hot_loop()
    assert loop is not None
    assert (loop.instructions, loop.wide_stores) == (4, 2)


def test_what_is_not_understood_is_an_error():
    with pytest.raises(cubins.CompileError, match="not understood"):
        cubins.parse(listing("?"))
    with pytest.raises(cubins.CompileError, match="not understood"):
        cubins.parse(listing("BRA `(.L_9)", "EXIT"))["toy"].loops()
    with pytest.raises(cubins.CompileError, match=r"decode\.cu\(1\): error"):
        compile_toys("nonsense", "80")


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "threads", "blocks"),
    [
        *(
            ("80", 8, 3333, 96, 21),
            ("90", 8, 0, 32, 32),
            ("86", 8, 0, 32, 16),
            ("89", 8, 0, 32, 24),
            ("120", 8, 0, 32, 24),
        ),
        *(
            ("80", 47, 16665, 128, 9),
            ("86", 47, 16665, 128, 5),
            ("100", 47, 16665, 128, 10),
            ("100", 65, 16665, 128, 7),
        ),
        *(("90", 35, 16665, 544, 2), ("80", 98, 46662, 704, 0), ("89", 113, 3333, 32, 16), ("120", 185, 13332, 64, 4)),
        *(("80", 32, 0, 256, 8), ("86", 32, 0, 256, 6), ("90", 32, 49152, 256, 4), ("120", 32, 49152, 256, 2)),
    ],
)
def test_blocks_of_a_multiprocessor(architecture, registers, shared_bytes, threads, blocks):
    """As computed by cudaOccMaxActiveBlocksPerMultiprocessor of cuda_occupancy.h."""
    assert cubins.blocks_per_sm(architecture, registers, shared_bytes, threads) == blocks


def die(*_: object) -> None:
    os.abort()


def test_a_compiler_that_crashes_is_an_error(monkeypatch):
    monkeypatch.setattr(cubins, "compile_cubin", die)
    with pytest.raises(cubins.CompileError, match=r"libnvrtc\.so\.12 crashes on this source for sm_80"):
        cubins.compile_kernels("", "80")


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setitem(cubins.NVRTC_WHEELS, 12, "nvidia-of-which-nobody-heard")
    with pytest.raises(cubins.MissingWheelError, match="pip install nvidia-of-which-nobody-heard"):
        cubins.nvrtc_library(12)
