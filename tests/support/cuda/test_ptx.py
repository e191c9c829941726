"""Translated PTX computes what a GPU would, and its memory is watched."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import cubins
from tests.support.cuda import ptx
from tests.support.cuda.emulator import Address, Buffer, Case, LaunchError, run_batch

TOYS = r"""
__device__ unsigned shared_address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

#define COPY asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(s + 4 * threadIdx.x)), \
                          "l"(in + 4 * threadIdx.x) : "memory");
#define WAIT asm volatile("cp.async.wait_all;" ::: "memory");
#define TOY(name) extern "C" __global__ void name(const unsigned* in, unsigned* out, unsigned n)

TOY(right) {
    __shared__ alignas(16) unsigned s[256];
    COPY WAIT
    __syncthreads();
    const unsigned mine = s[(threadIdx.x + n) % 256];
    out[threadIdx.x] = mine;
    __syncwarp();
    out[threadIdx.x ^ 1] = mine;
}
TOY(without_barrier) {
    __shared__ unsigned s[64];
    s[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = s[(threadIdx.x + n) % 64];
}
TOY(without_wait) {
    __shared__ alignas(16) unsigned s[256];
    COPY
    out[threadIdx.x] = s[4 * threadIdx.x];
    WAIT
}
TOY(copy_that_nobody_waits_for) {
    __shared__ alignas(16) unsigned s[256];
    COPY
    if (n == 99) { WAIT out[0] = s[threadIdx.x]; }
}
TOY(two_write_one_place) { out[threadIdx.x / 2] = in[threadIdx.x]; }
TOY(blocks_write_one_place) { out[threadIdx.x] = in[threadIdx.x] + blockIdx.x; }
TOY(constant_load_of_what_is_written) {
    out[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x + 64] = __ldg(out + (threadIdx.x ^ 1));
}
TOY(outside_the_variable) {
    __shared__ unsigned s[64];
    s[threadIdx.x + n] = in[threadIdx.x];
    out[threadIdx.x] = s[threadIdx.x + n];
}
TOY(stray_prefetch) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(in + 256 * n));
    out[threadIdx.x] = in[threadIdx.x];
}
TOY(barrier_of_a_part) {
    if (threadIdx.x % 32 < 16) __syncwarp(0xFFFF);
    out[threadIdx.x] = in[threadIdx.x];
}
"""
IN = np.arange(1000, 1256, dtype=np.uint32)


@functools.cache
def files() -> tuple[Path, Path]:
    return ptx.write(cubins.compile_ptx(TOYS, "80", cubins.nvrtc_library(12)))


def launch(kernel: str, n: int, blocks: int = 1, seed: int = 0) -> Case:
    out = Buffer(np.zeros(256, np.uint32))
    return Case(kernel, blocks, 64, [Address(Buffer(IN)), Address(out), np.uint32(n)], [out], seed)


def test_what_is_right_passes() -> None:
    for [out] in run_batch(*files(), [launch("right", 5, seed=seed) for seed in range(6)]):
        of_the_other = IN[((np.arange(64) ^ 1) + 5) % 256]
        np.testing.assert_array_equal(out[:64], of_the_other)


@pytest.mark.parametrize(
    ("kernel", "n", "blocks", "what"),
    [
        ("right", 5, 1, ""),
        ("without_barrier", 0, 1, ""),
        ("without_barrier", 1, 1, "race, read after write of .*, with thread"),
        ("without_wait", 0, 1, "race, .* with the cp.async of thread"),
        ("copy_that_nobody_waits_for", 0, 1, "exits with a cp.async under way"),
        ("two_write_one_place", 0, 1, "race, global write after write"),
        ("blocks_write_one_place", 0, 1, ""),
        ("blocks_write_one_place", 0, 2, "race, global write after write"),
        ("constant_load_of_what_is_written", 0, 1, r"ld\.global\.nc of what the kernel has written"),
        ("outside_the_variable", 0, 1, ""),
        ("outside_the_variable", 1, 1, "outside all variables"),
        ("stray_prefetch", 0, 1, ""),
        ("stray_prefetch", 1, 1, "heap-buffer-overflow"),
        ("barrier_of_a_part", 0, 1, r"bar\.warp\.sync with mask 0x0000ffff"),
    ],
)
def test_what_is_noticed(kernel: str, n: int, blocks: int, what: str) -> None:
    for seed in range(3):  # copies that arrive late, at once, and either
        if not what:
            run_batch(*files(), [launch(kernel, n, blocks, seed)])
            continue
        with pytest.raises(LaunchError, match=what):
            run_batch(*files(), [launch(kernel, n, blocks, seed)])


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %f1, %f2;",
        "shf.r.clamp.b32 %r1, %r2, %r3, %r4;",
        "bar.sync 1;",
        "div.s32 %r1, %r2, %r3;",
        "mul.hi.u64 %r1, %r2, %r3;",
    ],
)
def test_what_is_not_known_is_an_error(line: str) -> None:
    text = f".visible .entry toy(\n\t.param .u32 toy_param_0\n)\n{{\n\t{line}\n\tret;\n\n}}\n"
    with pytest.raises(ptx.PtxError, match="line 5"):
        ptx.translate(text)
    with pytest.raises(ptx.PtxError, match="no kernel"):
        ptx.translate("")
