"""The emulator of CUDA on the CPU: it computes what a GPU would, and notices mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.cuda import emulator
from tests.support.cuda.emulator import Address, Buffer, Case, LaunchError, Library, Struct, run_batch

SOURCE = Path(emulator.__file__).with_name("selftest.cu")
KERNELS = SOURCE.with_name("selftest_kernels.h")
SEEDS = range(12)
PLACE = np.dtype([("bytes", np.uint64), ("size", np.uint64)])


@pytest.fixture(scope="module")
def library():
    return Library(SOURCE, KERNELS)


def random_words(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def empty(*shape, dtype=np.uint32):
    return Buffer(np.full(shape, 0xA5A5A5A5, dtype))


def run_both(library, cases):
    """The outputs of the cases, which both forms must agree on."""
    fast = [library.run(case) for case in cases]
    guarded = run_batch(SOURCE, KERNELS, cases)
    for left, right in zip(fast, guarded, strict=True):
        for a, b in zip(left, right, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    return fast


def expected_primitives(values):
    """The results of warp_primitives for one warp: (32, 16)."""
    v = [int(x) for x in values]
    wide = [x << 32 | ~x & 0xFFFFFFFF for x in v]
    result = np.zeros((32, 16), np.uint64)
    for lane in range(32):
        group = range(11) if lane < 11 else range(11, 32)
        before = v[max(lane - 1, 0)]
        result[lane] = [
            v[v[lane] % 32],
            v[lane - 3 if lane >= 3 else lane],
            v[lane + 5 if lane + 5 < 32 else lane],
            v[lane ^ 17],
            wide[(lane * 7 + 3) % 32],
            sum((x & 1) << i for i, x in enumerate(v)),
            2 * any(x % 64 == 0 for x in v) + all(x % 64 != 0 for x in v),
            sum(v) % 2**32,
            max(v),
            np.bitwise_or.reduce([x & 0x11111111 for x in v]),
            before - (before >> 31 << 32) & 0xFFFFFFFFFFFFFFFF,  # sign-extended
            sum(v[:11]) % 2**32 if lane < 11 else v[11],
            sum((v[i] & 1) << i for i in range(11)) if lane < 11 else max(v[i] for i in group),
            wide[31] if lane == 0 else wide[lane],
            0,
            0,
        ]
    return result


def test_warp_primitives_for_all_orders(library):
    values = random_words(2, 96)
    values[0, 40:50] &= ~np.uint32(63)
    expected = np.concatenate([expected_primitives(warp) for warp in values.reshape(-1, 32)]).reshape(2, 96, 16)
    results = empty(2, 96, 16, dtype=np.uint64)
    cases = [
        Case("warp_primitives", 2, 96, [Address(Buffer(values)), Address(results)], [results], seed) for seed in SEEDS
    ]
    for [result] in run_both(library, cases):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("block", [64, 256])
def test_scan_over_a_block(library, block):
    values = random_words(3, block)
    sums = empty(3, block)
    expected = values
    for _ in range(5):
        expected = np.cumsum(expected, axis=1, dtype=np.uint32)
    cases = [
        Case("scan", 3, block, [Address(Buffer(values)), Address(sums), np.uint32(5)], [sums], seed) for seed in SEEDS
    ]
    for [result] in run_both(library, cases):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("mode", "mask"), [(0, 255), (2, 31)])
def test_missing_barrier_shows(library, mode, mask):
    """Without the barrier, about half of the threads read too early, whatever the seed; with it, none."""
    results = empty(256)
    expected = np.arange(256) ^ mask
    for seed in SEEDS:
        [without] = library.run(Case("exchange", 1, 256, [Address(results), np.uint32(mode)], [results], seed))
        assert 64 < np.count_nonzero(without != expected) < 192
        [with_barrier] = library.run(Case("exchange", 1, 256, [Address(results), np.uint32(mode + 1)], [results], seed))
        np.testing.assert_array_equal(with_barrier, expected)


def test_order_follows_the_seed(library):
    """A seed always gives the same order, in both forms. Over the seeds, each warp and each block is first and last."""
    order = empty(3 * 8 * 2)
    count = Buffer(np.zeros(1, np.uint32))
    cases = [
        Case("order", 3, 256, [Address(order), Address(count), np.uint32(20)], [order], seed) for seed in range(80)
    ]
    runs = [result.ravel().tolist() for [result] in run_both(library, cases)]
    assert runs == [library.run(case)[0].ravel().tolist() for case in cases]
    assert len(set(map(tuple, runs))) == len(runs)
    assert all(sorted(run) == list(range(48)) for run in runs)
    blocks = [[event // 16 for event in run[::16]] for run in runs]
    assert {block[0] for block in blocks} == {block[-1] for block in blocks} == {0, 1, 2}
    for place in (0, 15):
        assert {run[place] // 2 % 8 for run in runs} == set(range(8))
    first_ends = [next(i for i, event in enumerate(run) if event % 2) for run in runs]
    assert min(first_ends[0::4]) == 8  # with one candidate, all warps of a block have begun when the first ends
    assert sum(end < 8 for end in first_ends[3::4]) > 5


def test_shared_memory_is_poisoned_for_each_block(library):
    results = empty(4, 96)
    found = [library.run(Case("read_unwritten", 4, 32, [Address(results)], [results], seed))[0] for seed in SEEDS]
    words = np.concatenate(found).ravel()
    assert len(np.unique(words)) > 0.99 * words.size
    np.testing.assert_array_equal(
        found[3], library.run(Case("read_unwritten", 4, 32, [Address(results)], [results], 3))[0]
    )


DIVERGENCE = {  # by number of the mistake: the message of the first thread to notice, which depends on the seed
    1: r"\d+: (__syncthreads, but \d+ threads of the block have exited|exits while \d+ threads wait at __syncthreads)",
    2: r"(7: __syncthreads while lane \d+ waits for it at"
    r"|\d+: __syncwarp with mask 0xffffffff, but lanes 0x00000080 wait at __syncthreads)",
    3: r"\d+: (__syncwarp with mask 0xffffffff, but lanes 0x00000008 have exited"
    r"|exits while lane \d+ waits for it at __syncwarp)",
    4: r"(16|48): exits while lane \d+ waits for it at __ballot_sync with mask 0x0001ffff",
    5: r"\d+: __(any|all)_sync with mask 0xffffffff, but lane \d+ waits at __(any|all)_sync with mask 0xffffffff",
    6: r"\d+: __shfl_sync with mask 0x0000ffff: lane 0 reads lane 16, which is not in it",
    7: r"(0|32): __reduce_add_sync with mask 0xfffffffe, which lacks the calling lane 0",
    8: r"\d+: deadlock: no thread can go on; thread 32 waits at __syncwarp with mask 0x00000003",
    9: r"\d+: exits while \d+ threads wait at __syncthreads",
    10: r"\d+: __syncthreads, but \d+ threads of the block have exited",
}


@pytest.mark.parametrize("mistake", DIVERGENCE)
def test_divergence_ends_the_launch(library, mistake):
    """In one line; the next launch starts afresh."""
    for seed in range(8):
        with pytest.raises(
            LaunchError, match=rf"^diverge <<<1, 64>>>, seed {seed}, block 0, thread {DIVERGENCE[mistake]}[^\n]*\Z"
        ):
            library.launch("diverge", 1, 64, np.uint32(mistake), seed=seed)
        library.launch("diverge", 1, 64, np.uint32(0), seed=seed)


def test_divergence_in_a_partial_warp(library):
    with pytest.raises(
        LaunchError, match="__shfl_xor_sync with mask 0xffffffff, but lanes 0xffffff00 have exited or do not exist"
    ):
        library.launch("busy", 1, 40, np.uint64(0))


def stray(size, mistake, index, alignment=16):
    """A launch of the kernel that goes astray where ``index`` says so."""
    result = empty(1)
    place = Struct(np.zeros((), PLACE), {PLACE.fields["bytes"][1]: Address(Buffer(np.ones(size, np.uint8), alignment))})
    return Case("stray", 1, 1, [place, np.uint32(mistake), np.int32(index), Address(result)], [result])


UBSAN = "runtime error: "
ASAN = "ERROR: AddressSanitizer: "


@pytest.mark.parametrize(
    ("good", "bad", "report"),
    [
        ((37, 0, 36), (37, 0, 37), ASAN + "heap-buffer-overflow"),
        ((0x1001, 0, 0x1000), (0x1001, 0, 0x1001), ASAN + "heap-buffer-overflow"),
        ((32, 0, 0), (32, 0, -1), ASAN + "use-after-poison"),
        ((32, 0, 0, 8), (32, 0, -1, 8), ASAN + "use-after-poison"),
        ((5, 0, 4, 1), (5, 0, 5, 1), ASAN + "heap-buffer-overflow"),
        ((64, 1, 16), (64, 1, 8), UBSAN + "member access within misaligned address"),
        ((64, 1, 48), (63, 1, 48), ASAN + "heap-buffer-overflow"),
        ((64, 1, 8, 8), (64, 1, 0, 8), UBSAN + "member access within misaligned address"),
        ((64, 2, 8), (64, 2, 4), UBSAN + "member access within misaligned address"),
        ((1, 3, 6), (1, 3, 7), ASAN + "global-buffer-overflow"),
        ((1, 4, 12), (1, 4, 13), ASAN + "global-buffer-overflow"),
        ((1, 5, 6), (1, 5, 7), UBSAN + "index 7 out of bounds"),
        ((1, 6, 4), (1, 6, 5), ASAN + "stack-buffer-overflow"),
    ],
)
def test_stray_access_is_caught(good, bad, report):
    """The last valid access passes; the first invalid one ends the batch and is named."""
    run_batch(SOURCE, KERNELS, [stray(*good)])
    with pytest.raises(LaunchError, match=r"case 2 \(stray, seed 0\) ended with status") as caught:
        run_batch(SOURCE, KERNELS, [stray(*good), stray(*good), stray(*bad), stray(*good)])
    assert caught.value.case == 2
    assert report in str(caught.value)
    assert "selftest.cu" in str(caught.value)


def test_batch_reports_divergence_and_time():
    good, bad = Case("diverge", 1, 64, [np.uint32(0)]), Case("diverge", 1, 64, [np.uint32(7)], seed=5)
    with pytest.raises(
        LaunchError,
        match=r"^case 1 \(diverge, seed 5\) ended with status 2\ndiverge <<<1, 64>>>, seed 5, block 0, thread",
    ) as caught:
        run_batch(SOURCE, KERNELS, [good, bad])
    assert caught.value.case == 1
    order, count = empty(512), Buffer(np.zeros(1, np.uint32))
    with pytest.raises(LaunchError, match=r"^case 0 \(order, seed 0\) took more than 0.3 s"):
        run_batch(
            SOURCE,
            KERNELS,
            [Case("order", 1, 256, [Address(order), Address(count), np.uint32(2**32 - 1)])],
            timeout=0.3,
        )


def byte_perm(a, b, selector):
    return sum(((b << 32 | a) >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i for i in range(4))


def expected_intrinsics(a, b, c):
    both, shift = b << 32 | a, c % 32
    signed = [x - (x >> 31 << 32) for x in (a, b)]
    a64 = [a << 7, a << 9]
    return [
        byte_perm(a, b, c),
        both << shift >> 32 & 0xFFFFFFFF,
        both >> shift & 0xFFFFFFFF,
        int(f"{a:032b}"[::-1], 2),
        a.bit_count(),
        32 - a.bit_length(),
        (a & -a).bit_length(),
        a * b >> 32,
        min(signed) & 0xFFFFFFFF,
        min(a, b),
        max(a, b),
        max(a << shift, b),
        min(signed) & 0xFFFFFFFFFFFFFFFF,
        64 - a64[0].bit_length() << 32 | (a64[1] & -a64[1]).bit_length(),
        a + b,
        (a * b).bit_count(),
    ]


def test_intrinsics(library):
    special = [0, 1, 31, 32, 33, 0x3210, 0x7654, 0xFEDC, 0xB8A9, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    operands = np.array([(a, b, c) for a in special for b in special for c in special], np.uint32)
    operands = np.concatenate([operands, random_words(1024 - len(operands) % 1024, 3)])
    results = empty(len(operands), 16, dtype=np.uint64)
    [[result]] = run_both(
        library,
        [Case("intrinsics", len(operands) // 256, 256, [Address(Buffer(operands)), Address(results)], [results])],
    )
    np.testing.assert_array_equal(
        result, np.array([expected_intrinsics(*map(int, operand)) for operand in operands], np.uint64)
    )


def test_atomics(library):
    totals, wide = Buffer(np.zeros(3, np.uint32)), Buffer(np.zeros(1, np.uint64))
    [[first, second]] = run_both(library, [Case("atomics", 2, 100, [Address(totals), Address(wide)], [totals, wide])])
    assert first.tolist() == [2 * 4950, 0xFFFFFFFF, max(i ^ 21 for i in range(100))]
    assert second.tolist() == [200 << 32]


def test_large_blocks_and_stacks(library):
    """1024 threads, each with 8 KiB of its own across a barrier."""
    results = empty(1024)
    [[result]] = run_both(library, [Case("deep", 1, 1024, [Address(results), np.uint32(2048)], [results], 3)])
    assert result.tolist() == [sum(range(2048))] * 1024


def test_wrong_launches_are_refused(library):
    result = empty(2000)
    with pytest.raises(LaunchError, match=r"^there is no kernel missing$"):
        library.launch("missing", 1, 32)
    with pytest.raises(LaunchError, match=r"^exchange wants arguments of \[8, 4\] bytes, got \[8, 8\]$"):
        library.run(Case("exchange", 1, 32, [Address(result), np.uint64(1)]))
    with pytest.raises(
        LaunchError, match=r"^exchange <<<1, 1025>>>: a grid has 1 block at least, a block 1 to 1024 threads$"
    ):
        library.run(Case("exchange", 1, 1025, [Address(result), np.uint32(1)]))
    with pytest.raises(LaunchError, match="an argument has another size than the kernel's parameter"):
        run_batch(SOURCE, KERNELS, [Case("exchange", 1, 32, [Address(result), np.uint64(1)])])
    with pytest.raises(ValueError, match="an alignment is a power of two, not 12"):
        Buffer(np.zeros(1), 12)


def test_source_that_does_not_compile(tmp_path):
    """What nvcc refuses is refused, and so is a warning."""
    (tmp_path / "kernels.h").write_text("CUDA_ON_CPU_KERNEL(kernel)\n")
    for body, complaint in [
        ("*result = min(*result, 1);", "call of overloaded .*min.* is ambiguous"),
        ("uint3 value{}; *result = __ldg(&value).x;", "a GPU does not load or store this at once"),
        ("unsigned unused;", "unused variable"),
    ]:
        (tmp_path / "wrong.cu").write_text(
            f'extern "C" __global__ void kernel(unsigned long long* result) {{ {body} *result = 1; }}\n'
        )
        with pytest.raises(RuntimeError, match=rf"^wrong.cu does not compile:\n[\s\S]*{complaint}"):
            Library(tmp_path / "wrong.cu", tmp_path / "kernels.h")


def test_missing_compiler():
    code = (
        "from tests.support.cuda import emulator as e; from pathlib import Path;"
        " e.GNU_CXX = 'no-such-g++'; e.Library(Path('a.cu'), Path('a.h'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parents[3], capture_output=True, text=True, check=False
    )
    assert run.stderr.endswith("RuntimeError: g++ is needed to run the CUDA sources on the CPU: apt-get install g++\n")
