"""Containers into torch, compressed tensors, the operators: on the CPU, and on a GPU whose CUDA source is emulated."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import df11
from df11 import runtime
from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import batches, load, operators
from tests.support import records, strategies
from tests.support.cuda.device import STREAM, emulate

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "gpu"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What decodes in a test: the CPU's decoder, or a GPU's."""
    return emulate(monkeypatch)[0] if request.param == "gpu" else operators.decoder_of(CPU)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.bf16": torch.randn(300, 70, generator=generator).to(torch.bfloat16),
        "b.large": torch.randn(1100, 2048, generator=generator).mul(0.02).to(torch.bfloat16),
        "all bf16": torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16),
        "zeros": torch.zeros(50_000, dtype=torch.bfloat16),
        "f32": torch.randn(1000, 1000, generator=generator),
        "scalar": torch.tensor(math.pi),
        "empty": torch.zeros((0, 4), dtype=torch.int64),
        "f8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16),
        "odd": torch.arange(5, dtype=torch.int16),
        "bool": torch.tensor([True, False]),
        **{f"small.{i}": torch.randn(8200 + i, generator=generator).to(torch.bfloat16) for i in range(70)},
    }


@pytest.fixture(scope="module")
def container(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("container")
    save_file(tensors, folder / "x.safetensors")
    df11.convert(folder / "x.safetensors", folder / "x.df11")
    return folder / "x.df11"


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))


def compressed(weights: torch.Tensor) -> runtime.CompressedTensor:
    record = records.encode(weights.contiguous().view(-1).view(torch.int16).numpy().view(np.uint16))
    return runtime.CompressedTensor(torch.from_numpy(record.copy()), weights.shape)


# Importing.


def test_importing_is_light() -> None:
    code = (
        "import sys; from df11 import runtime; from df11.runtime import kernels\n"
        "heavy = {'torch', 'cupy', 'pyarrow', 'typer', 'tqdm', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_is_named_when_it_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from df11 import runtime; runtime.load_file('x.df11')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "pip install 'df11[torch]'" in result.stderr


# Whole files.


def test_tensors_are_those_of_safetensors(container: Path) -> None:
    expected = load_file(container.with_suffix(".safetensors"))
    loaded = runtime.load_file(container, device="cpu")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(loaded[name], tensor), name


@pytest.mark.parametrize("capacity", [1 << 12, 1 << 20, 1 << 24])
def test_through_the_ring(capacity: int, container: Path, tensors: dict[str, torch.Tensor], decoder: Any) -> None:
    # Slots smaller than a segment, than a tensor, and larger than the file.
    with Container(container) as opened:
        loaded = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
        load.load_through_ring(opened, loaded, CPU, decoder, capacity)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name


@pytest.mark.parametrize("capacity", [1 << 12, 1 << 20, 1 << 24])
def test_batches_hold_each_byte_once(capacity: int, container: Path) -> None:
    with Container(container) as opened:
        fill, weights, verbatim = 0, dict.fromkeys(opened.keys(), 0), dict.fromkeys(opened.keys(), 0)
        for batch in batches.cut(opened, capacity, opened.keys()):
            assert batch.begin >= fill
            fill = batch.end
            assert batch.size <= capacity or len(batch.segments) == 1
            assert len(batch.records) <= 64
            assert all(part.start % 16 == 0 for part in batch.records)
            for part in batch.records:
                assert part.first_element == weights[part.name]
                weights[part.name] += part.elements
            for raw in batch.verbatim:
                assert raw.offset == verbatim[raw.name]
                verbatim[raw.name] += raw.size
        for name in opened.keys():
            info = opened.info(name)
            assert (weights[name], verbatim[name]) == (
                (info.elements, 0) if info.encoding == "df11" else (0, info.stored_bytes)
            )


def flipped(path: Path, target: Path, place: int) -> Path:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("name", ["b.large", "f32"])
def test_damage_is_found(
    name: str, container: Path, tmp_path: Path, decoder: Any, tensors: dict[str, torch.Tensor]
) -> None:
    with Container(container) as opened:
        header = opened.size - max(opened.span(other)[1] for other in opened.keys())
        begin, end = opened.span(name)
    bad = flipped(container, tmp_path / "bad.df11", header + (begin + end) // 2)
    with pytest.raises(errors.ChecksumError, match=f"bad.df11.*{name}"):
        runtime.load_file(bad, device="cpu") if decoder is operators.decoder_of(CPU) else None
        with Container(bad) as opened:
            load.load_through_ring(
                opened, {key: torch.empty_like(tensor) for key, tensor in tensors.items()}, CPU, decoder, 1 << 20
            )


def test_a_file_that_ends_early(container: Path, tmp_path: Path) -> None:
    (tmp_path / "x.df11").write_bytes(container.read_bytes()[:-100])
    with pytest.raises(errors.TruncatedFileError, match=r"x\.df11"):
        runtime.load_file(tmp_path / "x.df11", device="cpu")


def test_a_dtype_that_torch_lacks() -> None:
    with pytest.raises(errors.DtypeError, match=r"layer\.F[46].*no such dtype"):
        runtime.load_file(Path(__file__).parents[1] / "vectors" / "golden" / "verbatim.df11", device="cpu")


# Compressed tensors.


def test_decoding(decoder: Any, tensors: dict[str, torch.Tensor], container: Path) -> None:
    with Container(container) as opened:
        for name in ("a.bf16", "b.large", "all bf16", "zeros", "small.3"):
            if opened.info(name).encoding == "df11":
                tensor = runtime.CompressedTensor.load(opened, name, "cpu")
                assert (tensor.shape, tensor.device, tensor.elements) == (
                    tensors[name].shape,
                    CPU,
                    tensors[name].numel(),
                )
                for background in (False, True):
                    assert same(tensor.decode(background=background), tensors[name])
                out = torch.zeros_like(tensors[name])
                assert tensor.decode(out) is out
                assert same(out, tensors[name])
    decoder.check_errors()


@pytest.mark.usefixtures("decoder")
def test_rows() -> None:
    weights = torch.randn(70, 2520).to(torch.bfloat16)
    tensor = compressed(weights)
    for start, stop in ((0, 70), (0, 1), (69, 70), (13, 40), (5, 5)):
        assert same(tensor.rows(start, stop), weights[start:stop])
    ids = torch.tensor([[3, 3, 69], [0, 12, 1]])
    assert same(tensor.gather(ids), weights[ids])
    assert same(tensor.gather(ids.to(torch.int32).t()), weights[ids.t()])
    assert tensor.gather(torch.zeros((2, 0), dtype=torch.int64)).shape == (2, 0, 2520)


@pytest.mark.usefixtures("decoder")
def test_many() -> None:
    weights = [torch.randn(int(n), 24).to(torch.bfloat16) for n in torch.randint(1, 500, (130,))]
    for found, expected in zip(runtime.decode_many([compressed(w) for w in weights]), weights, strict=True):
        assert same(found, expected)
    assert runtime.decode_many([]) == []


@pytest.mark.parametrize("seed", [0, 1])  # CuPy 13 and 14
def test_launches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cupy = emulate(monkeypatch, seed)
    tensor = compressed(torch.randn(400, 2520).to(torch.bfloat16))
    tensor.decode()
    tensor.decode(background=True)
    tensor.gather(torch.tensor([3, 4]))
    runtime.decode_many([tensor] * 65)
    assert [(name, stream) for name, _, stream in cupy.launches] == [
        *[("df11_decode", STREAM), ("df11_decode_small", STREAM), ("df11_gather_rows", STREAM)],
        *[("df11_decode", STREAM), ("df11_decode", STREAM)],
    ]
    assert cupy.launches[2][1] == 2


def test_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = compressed(torch.randn(7, 8).to(torch.bfloat16))
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(errors.UsageError, match="no such rows"):
            tensor.rows(start, stop)
    with pytest.raises(errors.UsageError, match=r"no such row.*found 7"):
        tensor.gather(torch.tensor([0, 7]))
    with pytest.raises(errors.UsageError, match="i64 or i32"):
        tensor.gather(torch.tensor([0.0]))
    emulate(monkeypatch)
    assert tensor.gather(torch.tensor([0, 7]))[1].isnan().all()
    with pytest.raises(errors.UsageError, match="row index"):
        runtime.check_errors("cpu")
    runtime.check_errors("cpu")  # It has been reported already.


def test_damaged_memory(decoder: Any) -> None:
    tensor = compressed(torch.randn(100, 200).to(torch.bfloat16))
    tensor.record[48:56] = 255
    with pytest.raises(errors.FormatError):
        tensor.decode()
        decoder.check_errors()


@pytest.mark.parametrize(
    ("record", "shape", "segment_elements", "what"),
    [
        (torch.zeros(160, dtype=torch.int8), [8], 8192, "contiguous, one-dimensional u8 tensor"),
        (torch.zeros(2, 80, dtype=torch.uint8), [8], 8192, "contiguous, one-dimensional u8 tensor"),
        (torch.zeros(320, dtype=torch.uint8)[::2], [8], 8192, "contiguous, one-dimensional u8 tensor"),
        (torch.zeros(177, dtype=torch.uint8)[1:], [8], 8192, "aligned to 16"),
        (torch.zeros(160, dtype=torch.uint8), [8], 8191, "segment_elements"),
        (torch.zeros(160, dtype=torch.uint8), [8], 1 << 25, "segment_elements"),
        (torch.zeros(160, dtype=torch.uint8), [81], 8192, "cannot have this size"),
        (torch.zeros(168, dtype=torch.uint8), [8], 8192, "cannot have this size"),
        (torch.zeros(160, dtype=torch.uint8), [0], 8192, "cannot have this size"),
    ],
)
def test_what_is_no_record(record: torch.Tensor, shape: list[int], segment_elements: int, what: str) -> None:
    with pytest.raises(errors.UsageError, match=what):
        runtime.CompressedTensor(record, shape, segment_elements)


def test_wrong_outputs() -> None:
    tensor = compressed(torch.randn(16, 8).to(torch.bfloat16))
    for out in (
        torch.empty(16, 8),
        torch.empty(8, 16, dtype=torch.bfloat16).t(),
        torch.empty(127, dtype=torch.bfloat16),
    ):
        with pytest.raises(errors.UsageError):
            tensor.decode(out)
    with pytest.raises(errors.UsageError, match="other sizes"):
        runtime.decode_many([tensor, tensor], [torch.empty(16, 8, dtype=torch.bfloat16)])


def test_another_record_than_its_shape_says() -> None:
    tensor = compressed(torch.randn(1000).to(torch.bfloat16))
    with pytest.raises(errors.EntryError, match="does not match its shape"):
        runtime.CompressedTensor(tensor.record, [999]).decode()


# As seen by torch.


def test_operators_are_well_formed() -> None:
    tensor = compressed(torch.randn(40, 50).to(torch.bfloat16))
    arguments = (tensor.record, [40, 50], tensor.segment_elements)
    torch.library.opcheck(torch.ops.df11.decode, arguments)
    torch.library.opcheck(torch.ops.df11.decode_rows, (*arguments, 3, 9))
    torch.library.opcheck(torch.ops.df11.gather_rows, (*arguments, torch.tensor([3, 9])))
    out = torch.zeros(40, 50, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.df11.decode_into, ([tensor.record], [2000], [tensor.segment_elements], [0], [out]))


def test_a_graph_holds_the_operators() -> None:
    weights = torch.randn(40, 50).to(torch.bfloat16)
    tensor = compressed(weights)

    def model(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.linear(x, tensor.decode()), tensor.gather(ids) + tensor.rows(0, 2)

    x, ids = torch.randn(3, 50).to(torch.bfloat16), torch.tensor([5, 6])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        compiled(x, ids), (torch.nn.functional.linear(x, weights), weights[ids] + weights[:2]), strict=True
    ):
        assert torch.equal(found, expected)


def test_operators_are_called_only_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(40, 50).to(torch.bfloat16)
    tensor, out, ids = compressed(weights), torch.zeros(40, 50, dtype=torch.bfloat16), torch.tensor([5, 6])
    named = "decode", "decode_rows", "gather_rows", "decode_into"

    def use() -> list[torch.Tensor]:
        return [tensor.decode(), tensor.rows(3, 5), tensor.gather(ids), tensor.decode(out)]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watch():
        watched = use()
    assert [name for name in seen if name.startswith("df11.")] == [f"df11.{name}.default" for name in named]
    monkeypatch.setattr(operators, "_ops", None)
    for found, expected in zip(use(), watched, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(out, weights)


def test_a_trace_holds_the_operators() -> None:
    # Without them it would hold fresh memory that nobody decodes into.
    weights = torch.randn(40, 50).to(torch.bfloat16)
    tensor = compressed(weights)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, tensor.decode())

    x = torch.randn(3, 50).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, (x,))
    for function in (traced, torch.func.vmap(model), make_fx(model)(x)):
        assert torch.equal(function(2 * x), torch.nn.functional.linear(2 * x, weights))
    assert "df11::decode" in str(traced.graph)


def test_decoding_into_a_tensor_counts_as_a_write() -> None:
    tensor, out = compressed(torch.randn(40, 50).to(torch.bfloat16)), torch.zeros(40, 50, dtype=torch.bfloat16)
    x = torch.ones(40, 50, dtype=torch.bfloat16, requires_grad=True)
    product = (x * out).sum()
    tensor.decode(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        tensor.decode(torch.zeros(40, 50, dtype=torch.bfloat16))


def test_threads_and_processes() -> None:
    weights = strategies.make("gaussian", 3 * (1 << 21) // 2, 1)
    expected = torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16)
    tensor = compressed(expected)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tensor.decode())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(one, expected) for one in found)
    # A forked child has none of the parent's threads. It compares with NumPy: torch's own threads do not survive
    # either.
    process = multiprocessing.get_context("fork").Process(target=_decode_in_child, args=(tensor, weights))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns that forking with threads is risky
        process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


def _decode_in_child(tensor: runtime.CompressedTensor, weights: np.ndarray) -> None:
    sys.exit(0 if np.array_equal(tensor.decode().view(torch.int16).numpy().view(np.uint16), weights) else 3)
