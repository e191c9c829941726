"""Records of every dtype in torch: load_file, models, and the operators on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import df11
from df11 import runtime
from df11.formats import errors
from df11.formats.container import Container
from df11.runtime import load, operators
from df11.runtime.compressed import joined
from df11.runtime.load import load_through_ring
from tests.support.cuda.device import emulate

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
EACH = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = torch.device("cpu")


def weights(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    torch.manual_seed(len(shape))
    scale = 0.02 if dtype.itemsize > 1 else 30
    return (torch.randn(shape) * scale).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two tensors of every dtype, one of them a scalar, and what was F32 but is BF16."""
    path = tmp_path_factory.mktemp("kinds")
    tensors = {}
    for dtype in DTYPES:
        tensors |= {f"{dtype}": weights(dtype, 301, 299), f"{dtype} scalar": weights(dtype)}
    tensors["narrowed"] = weights(torch.bfloat16, 300, 300).float()
    save_file(tensors, path / "x.safetensors")
    df11.convert(path / "x.safetensors", path / "x.df11")
    return path


def test_load_file_gives_every_dtype(folder: Path) -> None:
    plain, found = load_file(folder / "x.safetensors"), runtime.load_file(folder / "x.df11", "cpu")
    assert found.keys() == plain.keys()
    narrowed = found.pop("narrowed")
    assert narrowed.dtype == torch.bfloat16
    assert torch.equal(narrowed.float(), plain["narrowed"])
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (plain[name].dtype, plain[name].shape)
        assert bits(tensor) == bits(plain[name])
    with Container(folder / "x.df11") as container:
        assert {container.info(str(dtype)).encoding for dtype in DTYPES} == {"df11"}


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_files_with_every_dtype_go_through_the_ring(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The way to a GPU: batches in any size, with records of several dtypes in one."""
    plain = load_file(folder / "x.safetensors")
    decoder = emulate(monkeypatch)[0] if device == "gpu" else operators.decoder_of(CPU)
    for capacity in (1, 200_000, 1 << 24):
        with Container(folder / "x.df11") as container:
            found = {
                name: torch.empty(container.info(name).shape, dtype=load.torch_dtype(container, name))
                for name in container.keys()
            }
            load_through_ring(container, found, CPU, decoder, capacity)
        assert all(bits(found[name].to(plain[name].dtype)) == bits(plain[name]) for name in plain)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@EACH
def test_the_operators_decode_every_dtype(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "gpu":
        emulate(monkeypatch)
    plain = load_file(folder / "x.safetensors")[str(dtype)]
    with Container(folder / "x.df11") as container:
        stored = container.record(str(dtype))
        record, segment = torch.from_numpy(stored.read_whole()), stored.segment_elements
    shape, ops = list(plain.shape), torch.ops.df11
    assert bits(ops.decode(record, shape, segment, dtype=dtype)) == bits(plain)
    assert bits(ops.decode_rows(record, shape, segment, 7, 130, dtype=dtype)) == bits(plain[7:130])
    ids = torch.tensor([[3, 300], [3, 0]])
    found = ops.gather_rows(record, shape, segment, ids, dtype=dtype)
    assert found.shape == (2, 2, 299)
    assert bits(found) == b"".join(bits(plain[row]) for row in (3, 300, 3, 0))
    out = torch.empty(5000, dtype=dtype)
    ops.decode_into([record], [plain.numel()], [segment], [777], [out], dtype=dtype)
    assert bits(out) == bits(plain.view(-1)[777:5777])
    if device == "gpu":  # Trusts the host to know the dtype of a record.
        return
    other = DTYPES[DTYPES.index(dtype) - 1]
    with pytest.raises(errors.Df11Error, match=r"dtype|size"):
        ops.decode(record, shape, segment, dtype=other)


def test_other_dtypes_have_no_records() -> None:
    with pytest.raises(errors.DtypeError, match="float64"):
        torch.ops.df11.decode(torch.zeros(4096, dtype=torch.uint8), [10], 8192, dtype=torch.float64)
    with pytest.raises(errors.DtypeError, match="int8"):
        operators.kind_of(torch.int8)


@EACH
def test_a_tensor_of_every_dtype_is_held_compressed(dtype: torch.dtype, folder: Path) -> None:
    plain = load_file(folder / "x.safetensors")[str(dtype)]
    with Container(folder / "x.df11") as container:
        held = runtime.CompressedTensor.load(container, str(dtype), "cpu")
    assert held.dtype == dtype
    assert bits(held.decode()) == bits(held.decode(torch.empty_like(plain))) == bits(plain)
    assert bits(held.rows(7, 130)) == bits(held.narrow(7, 130).decode()) == bits(plain[7:130])
    found = held.gather(torch.tensor([[3, 300], [3, 0]]))
    assert bits(found) == b"".join(bits(plain[row]) for row in (3, 300, 3, 0))
    side_by_side = joined([held, held], 1, stacked=False).decode().view(torch.uint8).view(301, 2, -1)
    assert all(bits(part) == bits(plain) for part in side_by_side.unbind(1))
    assert bits(held.cast(torch.float64).decode()) == bits(plain.double())
