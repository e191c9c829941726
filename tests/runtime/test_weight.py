"""Compressed weights as torch sees them: the decoded values through every door, or an error; and never a change."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import io
import pickle
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import linear

from df11.runtime import cpu, weight_operations
from df11.runtime.compressed import CompressedTensor, joined
from df11.runtime.weight import CompressedWeight, FrozenWeightError, joining
from tests.support import records

BF16 = torch.bfloat16


def torchs_operators() -> list[Any]:
    """torch's list of operators with samples of arguments. Its module wants a package that the list does not need."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("expecttest") is None:
            patch.setitem(sys.modules, "expecttest", SimpleNamespace(TestCase=unittest.TestCase))
        from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)


def compressed(values: torch.Tensor) -> CompressedTensor:
    bits = values.detach().contiguous().view(-1).view(torch.int16).numpy().view(np.uint16)
    return CompressedTensor(torch.from_numpy(records.encode(bits).copy()), values.shape)


def coded(values: torch.Tensor) -> CompressedWeight:
    """A parameter with these values."""
    made: Any = nn.Parameter(CompressedWeight.of(compressed(values)), requires_grad=False)
    return made  # type: ignore[no-any-return]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul_(0.1).to(BF16)


@pytest.fixture
def plain() -> torch.Tensor:
    return random(300, 256)


@pytest.fixture
def weight(plain: torch.Tensor) -> CompressedWeight:
    return coded(plain)


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all decodes, in weights."""
    sizes: list[int] = []
    decode = cpu.Cpu.decode

    def counting(self: cpu.Cpu, ranges: Any, **options: Any) -> None:
        sizes.extend(part.last - part.first for part in ranges)
        decode(self, ranges, **options)

    monkeypatch.setattr(cpu.Cpu, "decode", counting)
    return sizes


# It is a parameter.


def test_it_is_a_frozen_parameter_like_any_other(weight: CompressedWeight, plain: torch.Tensor) -> None:
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.stride()) == (
        plain.shape,
        plain.dtype,
        plain.device,
        plain.stride(),
    )
    assert (weight.numel(), weight.nbytes, weight.is_leaf, weight.grad, len(weight)) == (76800, 153600, True, None, 300)
    layer = nn.Linear(256, 300, bias=False, dtype=BF16)
    layer.weight = weight
    assert layer.get_parameter("weight") is next(layer.parameters()) is weight
    assert next(layer.parameters()).dtype == BF16
    assert type(layer) is nn.Linear
    assert f"{weight[3, 4]:.3f}" == f"{plain[3, 4]:.3f}"


def test_what_changes_nothing_is_allowed(weight: CompressedWeight, plain: torch.Tensor) -> None:
    weight.requires_grad_(False)
    weight.requires_grad = False
    weight.data = weight.data.cpu()
    weight.data = plain
    with torch.no_grad():
        weight.copy_(plain)
        weight.detach_()
    with pytest.warns(UserWarning, match="not trained"):
        weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="materialize"):
        weight.requires_grad = True
    assert not weight.requires_grad
    assert torch.equal(weight, plain)


def ema(weight: CompressedWeight) -> None:
    torch._foreach_lerp_([weight.data], [torch.zeros(300, 256, dtype=BF16)], 0.1)


CHANGES: dict[str, Callable[[CompressedWeight], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "+=": lambda weight: weight.__iadd__(1),
    "an item": lambda weight: weight.__setitem__((0, 0), 1),
    "data": lambda weight: weight.data.clamp_(-0.01, 0.01),
    "data is set": lambda weight: setattr(weight, "data", torch.zeros(300, 256, dtype=BF16)),
    "data of another shape": lambda weight: setattr(weight, "data", torch.zeros(3, dtype=BF16)),
    "data of another dtype": lambda weight: setattr(weight, "data", torch.zeros(300, 256)),
    "a view of a view": lambda weight: weight.t()[3].unsqueeze(0).zero_(),
    "a part": lambda weight: weight.split(100)[1].fill_(0),
    "copy_": lambda weight: weight.copy_(torch.zeros(300, 256)),
    "copy_ of nothing": lambda weight: weight.copy_(torch.empty(300, 256, device="meta")),
    "out": lambda weight: torch.neg(torch.zeros(300, 256, dtype=BF16), out=weight),
    "foreach": ema,
    "init": lambda weight: nn.init.normal_(weight),
    "set_": lambda weight: weight.set_(torch.zeros(3, dtype=BF16)),
    "resize_": lambda weight: weight.resize_(3),
    "renorm": lambda weight: nn.functional.embedding(torch.tensor([3]), weight, max_norm=0.1),
    "an optimizer": lambda weight: (
        torch.optim.SGD([weight], lr=1).step()
        if setattr(weight, "grad", torch.ones(300, 256, dtype=BF16)) is None
        else None
    ),
    "to_": lambda weight: nn.ParameterList([weight]).half(),
    "vector": lambda weight: nn.utils.vector_to_parameters(torch.zeros(76800, dtype=BF16), [weight]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_refused_and_the_record_unharmed(
    change: str, weight: CompressedWeight, plain: torch.Tensor
) -> None:
    before = weight.record.clone()
    with pytest.raises(FrozenWeightError, match="materialize"):
        CHANGES[change](weight)
    assert torch.equal(weight.record, before)
    assert torch.equal(weight, plain)


SKIPPED = {"empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "empty"}
"""Operators whose results have no values."""
WRITES = {"normal", "uniform", "exponential", "cauchy", "geometric", "log_normal", "bernoulli_"}


@pytest.mark.parametrize("part", range(2))
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_list_of_operators(part: int) -> None:
    """With a compressed first argument each gives what it gives with the plain one; its in-place form is refused."""
    calls = refused = 0
    for operator in torchs_operators()[part::2]:
        if BF16 not in operator.supported_dtypes("cpu") or operator.name in SKIPPED:
            continue
        samples = [
            sample
            for sample in operator.sample_inputs("cpu", BF16, requires_grad=False)
            if type(sample.input) is torch.Tensor
            and sample.input.numel()
            and sample.input.dtype == BF16
            and sample.input.layout is torch.strided
        ][:1]
        for sample in samples:
            plain = sample.input.contiguous()
            try:
                torch.manual_seed(0)
                expected = operator(plain.clone(), *sample.args, **sample.kwargs)
            except Exception:
                continue
            weight = coded(plain)
            torch.manual_seed(0)
            try:
                found = operator(weight, *sample.args, **sample.kwargs)
            except FrozenWeightError:
                assert operator.name in WRITES, operator.name
                continue
            same(found, expected, operator.name)
            calls += 1
            if operator.inplace_variant is not None:
                try:
                    operator.inplace_variant(weight, *sample.args, **sample.kwargs)
                except FrozenWeightError:
                    refused += 1
                except (RuntimeError, TypeError, ValueError, IndexError):
                    pass  # torch's own refusal, of dtypes for example.
            same(weight, plain, operator.name)
    assert calls > 150
    assert refused > 40


def same(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        if expected.layout is not torch.strided:
            found, expected = found.to_dense(), expected.to_dense()
        if expected.is_floating_point() or expected.is_complex():
            torch.testing.assert_close(found.clone(), expected.clone(), rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert torch.equal(found, expected), name
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            same(one, other, name)
    else:
        assert found == expected or found is expected or type(found) is type(expected), name


# What reads memory.


def through_safetensors(weight: CompressedWeight, _: Path) -> torch.Tensor:
    return safetensors.torch.load(safetensors.torch.save({"x": weight.data}))["x"]


def through_a_file(weight: CompressedWeight, folder: Path) -> torch.Tensor:
    model = nn.Module()
    model.x = weight
    safetensors.torch.save_model(model, str(folder / "x.safetensors"))
    return safetensors.torch.load_file(folder / "x.safetensors")["x"]


def through_torch_save(weight: CompressedWeight, folder: Path) -> torch.Tensor:
    torch.save({"parameter": weight, "x": weight.data}, folder / "x.pt")
    loaded: dict[str, torch.Tensor] = torch.load(folder / "x.pt", weights_only=True)
    assert type(loaded["parameter"]) is nn.Parameter
    assert torch.equal(loaded["parameter"], loaded["x"])
    return loaded["x"]


def through_torchscript(weight: CompressedWeight, folder: Path) -> torch.Tensor:
    layer = nn.Linear(256, 300, bias=False, dtype=BF16)
    layer.weight = weight
    torch.jit.trace(layer, torch.zeros(1, 256, dtype=BF16)).save(folder / "x.pt")
    assert layer.weight is weight
    return torch.jit.load(folder / "x.pt")(torch.eye(256, dtype=BF16)).t()  # type: ignore[no-any-return]


def bits(address: int) -> torch.Tensor:
    memory = (ctypes.c_int16 * 76800).from_address(address)
    return torch.frombuffer(memory, dtype=torch.int16).clone().view(BF16).view(300, 256)


READERS: dict[str, Callable[[CompressedWeight, Path], torch.Tensor]] = {
    "safetensors": through_safetensors,
    "save_model": through_a_file,
    "torch.save": through_torch_save,
    "TorchScript": through_torchscript,
    "numpy": lambda weight, _: torch.from_numpy(weight.view(torch.int16).numpy()).view(BF16),
    "array": lambda weight, _: torch.from_numpy(np.asarray(weight.float())).to(BF16),
    "DLPack": lambda weight, _: torch.from_dlpack(weight.data),
    "tolist": lambda weight, _: torch.tensor(weight.tolist(), dtype=BF16),
    "data_ptr": lambda weight, _: bits(weight.data_ptr()),
    "a view's data_ptr": lambda weight, _: bits(weight.data[2:].data_ptr() - 2 * 2 * 256),
    "storage": lambda weight, _: torch.tensor([], dtype=BF16).set_(weight.untyped_storage(), 0, (300, 256)),
    "deepcopy": lambda weight, _: copy.deepcopy(weight),
    "pickle": lambda weight, _: pickle.loads(pickle.dumps(weight)),
    "copy_": lambda weight, _: torch.empty(300, 256, dtype=BF16).copy_(weight),
    "clone": lambda weight, _: weight.clone().mul_(2).div_(2),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*not writable:UserWarning")
def test_whoever_reads_memory_sees_values(
    reader: str, weight: CompressedWeight, plain: torch.Tensor, tmp_path: Path
) -> None:
    assert torch.equal(READERS[reader](weight, tmp_path), plain)


def test_native_code_that_asks_torch_for_memory_gets_an_error(weight: CompressedWeight) -> None:
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(weight)


def test_addresses_tell_what_is_tied(weight: CompressedWeight, plain: torch.Tensor) -> None:
    other = coded(plain)
    assert weight.data_ptr() == weight.data.data_ptr() == copy.deepcopy(weight).data_ptr() != other.data_ptr()


def test_who_only_compares_addresses_decodes_nothing(weight: CompressedWeight, decodes: list[int]) -> None:
    name = {"__name__": "transformers.modeling_utils"}
    exec("def ask(x): return x.data_ptr(), x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()", name)
    ask: Any = name["ask"]
    assert ask(weight) == ask(weight.data) != ask(coded(random(300, 256)))
    assert ask(weight)[0] == ask(weight)[1] == ask(weight[2:])[0] - 2 * 2 * 256 > 1 << 60  # Nobody's memory.
    assert ask(weight)[2] == 153600
    assert not decodes


def test_pickles_stay_small(weight: CompressedWeight) -> None:
    assert len(pickle.dumps(weight)) < 0.7 * weight.nbytes
    buffer = io.BytesIO()
    torch.save(nn.ParameterList([weight]), buffer)  # torch.save is for those without df11.
    assert len(buffer.getvalue()) > weight.nbytes


# Computing with it.


def test_only_what_is_used_is_decoded(decodes: list[int]) -> None:
    plain = random(6, 64, 256)
    experts = coded(plain)
    used: dict[Callable[[torch.Tensor], torch.Tensor], int] = {
        lambda experts: experts[2]: 1,
        lambda experts: experts[-1]: 1,
        lambda experts: experts[1:3]: 2,
        lambda experts: experts[1:3][1]: 1,
        lambda experts: experts.transpose(1, 2)[4]: 1,
        lambda experts: experts.unbind()[5].t(): 1,
        lambda experts: experts[torch.tensor([3, 0, 3])]: 2,
        lambda experts: experts[4:4]: 0,
    }
    for part, size in used.items():
        assert torch.equal(part(experts), part(plain))
        assert sum(decodes) == size * 64 * 256
        decodes.clear()


def test_products_with_experts_decode_those_with_tokens(decodes: list[int]) -> None:
    plain = random(6, 64, 256)
    experts, x = coded(plain), random(8, 256)
    ends = torch.tensor([0, 3, 3, 8, 8, 8], dtype=torch.int32)
    found = torch._grouped_mm(x, experts.transpose(-2, -1), offs=ends)
    assert torch.equal(found, torch._grouped_mm(x, plain.transpose(-2, -1), offs=ends))
    assert sum(decodes) == 2 * 64 * 256


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_joined(dimension: int, decodes: list[int]) -> None:
    parts = [random(8, 32, 256) + number for number in range(3)]
    weights = [coded(part) for part in parts]
    stacked = torch.stack(weights[:2], dim=dimension)
    assert type(stacked) is torch.Tensor  # Its owner may change it.
    decodes.clear()
    with joining():
        stacked = torch.stack(weights[:2], dim=dimension)
        together = torch.cat([stacked, torch.stack(weights[1:], dim=dimension)], dim=3)
    assert not decodes
    expected = torch.cat([torch.stack(parts[:2], dim=dimension), torch.stack(parts[1:], dim=dimension)], dim=3)
    assert isinstance(together, CompressedWeight)
    assert torch.equal(together, expected)
    assert torch.equal(together[1], expected[1])
    assert torch.equal(together.transpose(1, 2)[1, 3:5], expected.transpose(1, 2)[1, 3:5])
    for copied in (copy.deepcopy(together), pickle.loads(pickle.dumps(nn.Parameter(together)))):
        assert torch.equal(copied, expected)


def test_a_joined_row_decodes_its_own_records(decodes: list[int]) -> None:
    parts = [random(64, 256) + number for number in range(6)]
    one = [joined([compressed(part) for part in parts[::2]], 0, stacked=True)]
    one.append(joined([compressed(part) for part in parts[1::2]], 0, stacked=True))
    both = joined(one, 1, stacked=False)
    assert torch.equal(both.rows(1, 2)[0], torch.cat(parts[2:4]))
    assert sorted(decodes) == [64 * 256, 64 * 256]


def derivative(matrix: torch.Tensor) -> torch.Tensor:
    x = random(4, 256).requires_grad_()
    (first,) = torch.autograd.grad(linear(x, matrix).tanh().sum(), x, create_graph=True)
    first.pow(2).sum().backward()
    return x.grad  # type: ignore[return-value]


DERIVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "twice": derivative,
    "vmap": lambda matrix: torch.func.vmap(lambda row: linear(row, matrix))(random(4, 256)),
    "jvp": lambda matrix: torch.func.jvp(lambda x: linear(x, matrix), (random(4, 256),), (random(4, 256),))[1],
    "jacrev": lambda matrix: torch.func.jacrev(lambda x: linear(x, matrix).sum(-1))(random(4, 256)),
    "functional_call": lambda matrix: torch.func.functional_call(
        nn.Linear(256, 300, bias=False, dtype=BF16), {"weight": matrix}, (random(4, 256),)
    ),
    "reentrant checkpoint": lambda matrix: gradient(
        lambda x: torch.utils.checkpoint.checkpoint(linear, x, matrix, use_reentrant=True)
    ),
    "checkpoint": lambda matrix: gradient(
        lambda x: torch.utils.checkpoint.checkpoint(linear, x, matrix, use_reentrant=False)
    ),
    "convolution": lambda matrix: gradient(lambda x: nn.functional.conv1d(x.t()[None], matrix[:, :, None])),
    "in inference mode": lambda matrix: torch.inference_mode()(lambda: matrix.t()[3] * 2 + matrix.reshape(-1)[7])(),
}


def gradient(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = random(4, 256).requires_grad_()
    function(x).float().pow(2).sum().backward()
    return x.grad  # type: ignore[return-value]


@pytest.mark.parametrize("what", DERIVED)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # which torch's own jvp uses
def test_derivatives(what: str, weight: CompressedWeight, plain: torch.Tensor) -> None:
    assert torch.equal(DERIVED[what](weight), DERIVED[what](plain))


def test_what_is_made_in_inference_mode_works_outside(weight: CompressedWeight, plain: torch.Tensor) -> None:
    with torch.inference_mode():
        made = nn.Parameter(CompressedWeight.of(weight.compressed), requires_grad=False)
        turned = made.t()
    x = random(4, 256).requires_grad_()
    (linear(x, made) + x @ turned).sum().backward()
    expected = random(4, 256).requires_grad_()
    (linear(expected, plain) + expected @ plain.t()).sum().backward()
    assert torch.equal(x.grad, expected.grad)  # type: ignore[arg-type]


class Adapted(nn.Module):
    """A frozen matrix with a LoRA beside it."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.weight = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix, requires_grad=False)
        self.down, self.up = nn.Parameter(random(4, 256)), nn.Parameter(random(300, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(linear(x, self.weight) + x @ self.down.t() @ self.up.t())


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_autograd_keeps_no_decoded_weight(backend: str | None, weight: CompressedWeight, plain: torch.Tensor) -> None:
    found = []
    for matrix in (plain, weight):
        model = Adapted(matrix)
        run: Any = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        own = {memory_of(parameter) for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def note(value: torch.Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> torch.Tensor:
            if memory_of(value) not in own:
                kept[memory_of(value)] = 0 if isinstance(value, CompressedWeight) else value.untyped_storage().nbytes()
            return value

        x = random(4, 256).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            loss = run(x).sum()
        loss.backward()
        found.append((sum(kept.values()), x.grad, model.down.grad, model.up.grad))
    assert found[0][0] == found[1][0] < 20_000
    assert all(torch.equal(one, other) for one, other in zip(found[0][1:], found[1][1:], strict=True))


def memory_of(value: torch.Tensor) -> int:
    return (value.record if isinstance(value, CompressedWeight) else value).untyped_storage().data_ptr()


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Decode in slices of 10 rows."""
    monkeypatch.setattr(weight_operations, "SLICE_WEIGHTS", 2560)
    return 2560  # type: ignore[return-value]


CALLS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "two dimensions": lambda matrix, x: linear(x, matrix),
    "three": lambda matrix, x: linear(x[None], matrix)[0],
    "three, not contiguous": lambda matrix, x: linear(x[:, None].expand(4, 2, 256).transpose(0, 1), matrix)[1],
    "bias": lambda matrix, x: linear(x, matrix, random(300)),
    "product": lambda matrix, x: x @ matrix.t(),
    "compiled": lambda matrix, x: torch.compile(linear, backend="aot_eager", fullgraph=True)(x, matrix),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("trained", [False, True])
def test_large_matrices_are_decoded_in_slices(
    call: str, trained: bool, weight: CompressedWeight, plain: torch.Tensor, slices: int, decodes: list[int]
) -> None:
    found, expected = random(4, 256).requires_grad_(trained), random(4, 256).requires_grad_(trained)
    result, right = CALLS[call](weight, found), CALLS[call](plain, expected)
    if call != "three, not contiguous" or not trained:  # which torch computes as a batch of products
        assert max(decodes) <= slices
    assert torch.equal(result, right)
    if trained:
        for one in (result, right):
            one.float().pow(2).sum().backward()
        exact = 2 * right.detach().float() @ plain.float()
        errors = [(gradient - exact).norm() / exact.norm() for gradient in (found.grad, expected.grad)]  # type: ignore[operator]
        assert errors[0] < 1.5 * errors[1]  # Summed in F32, as in one product.
