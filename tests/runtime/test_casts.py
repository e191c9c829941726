"""Models of compressed weights in another dtype: the bits of the plain model that was cast, and still compressed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from df11.runtime import materialize, memory_report, weight_operations
from df11.runtime.weight import CompressedWeight
from tests.runtime.test_weight import coded, random

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def values() -> torch.Tensor:
    """BF16 [300, 64], in part too large or too small for F16."""
    made = random(300, 64)
    made[:4] *= 2.0**120
    made[4:8] *= 2.0**-120
    made[8:12] *= 2.0**-14
    return made


class Model(nn.Module):
    """An embedding, tied to a linear layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 64, _weight=weight)
        self.embedding.weight = weight
        self.linear = nn.Linear(64, 300, dtype=torch.bfloat16)
        self.linear.weight = weight
        self.linear.bias = nn.Parameter(random(300), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Of [n] ids, [n, 300]."""
        return self.linear(self.embedding(ids))  # type: ignore[no-any-return]


def pair() -> tuple[Model, Model]:
    """A model whose weight is compressed, and the same, plain."""
    made = Model(coded(values())), Model(nn.Parameter(values(), requires_grad=False))
    made[0].linear.bias = copy.deepcopy(made[1].linear.bias)
    return made


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.sampled_from(DTYPES), max_size=4))
def test_a_cast_model_is_the_plain_model_that_was_cast(chain: list[torch.dtype]) -> None:
    model, plain = pair()
    record = model.linear.weight.record.clone()
    ids = torch.tensor([13, 2, 299, 100])
    for dtype in chain:
        model.to(dtype)
        plain.to(dtype)
    assert type(model.linear.weight) is CompressedWeight
    assert model.linear.weight is model.embedding.weight
    assert_same(model.linear.weight.decode(), plain.linear.weight)
    assert_same(model.linear.weight[7:100], plain.linear.weight[7:100])
    assert_same(model.embedding(ids), plain.embedding(ids))
    assert_same(model(ids), plain(ids))
    assert torch.equal(model.linear.weight.record, record)
    assert memory_report(model).compressed == record.numel()


@pytest.mark.parametrize("method", ["half", "float", "double", "bfloat16"])
def test_every_way_to_cast_a_module(method: str) -> None:
    model, plain = (getattr(one, method)() for one in pair())
    assert type(model.linear.weight) is CompressedWeight
    assert_same(model.linear.weight.decode(), plain.linear.weight)


@pytest.mark.parametrize("convert", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.bfloat16(), nn.Module.half])
def test_a_model_is_converted_while_autograd_holds_its_weights(convert: Callable[[nn.Module], nn.Module]) -> None:
    model, plain = pair()
    held = [one.linear(random(2, 64).requires_grad_()) for one in (model, plain)]
    weight = model.linear.weight
    convert(model)
    convert(plain)
    assert model.linear.weight is model.embedding.weight is weight
    assert_same(weight.decode(), plain.linear.weight)
    assert held[0].requires_grad


def test_other_code_gets_values_that_it_may_change() -> None:
    weight = coded(values())
    cast = weight.float()
    assert type(cast) is torch.Tensor
    cast.zero_()
    assert_same(weight.decode(), values())


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(weight_operations, "SLICE_WEIGHTS", 1000)
    yield


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("trained", [False, True])
def test_large_matrices_are_cast_in_slices(trained: bool) -> None:
    outputs, gradients = [], []
    for model in (one.float() for one in pair()):
        x = torch.linspace(-1, 1, 128).reshape(2, 64).requires_grad_(trained)
        with torch.no_grad():
            model.linear.bias.zero_()
        made = model.linear(x)
        outputs.append(made.detach()[:, 12:])
        if trained:
            made[:, 12:].sum().backward()
            gradients.append(x.grad)
    torch.testing.assert_close(*outputs)
    if trained:
        torch.testing.assert_close(*gradients)


def test_a_cast_weight_is_copied_saved_moved_and_taken_apart() -> None:
    model, plain = (one.half() for one in pair())
    assert_same(copy.deepcopy(model).linear.weight.decode(), plain.linear.weight)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    assert_same(torch.load(saved)["linear.weight"], plain.linear.weight)
    assert model.linear.weight.to("meta").dtype == torch.float16
    assert_same(model.linear.weight.T[3:9, ::2].contiguous(), plain.linear.weight.T[3:9, ::2].contiguous())
    assert model.linear.weight.untyped_storage().nbytes() == 300 * 64 * 2
    materialize(model)
    assert_same(model.linear.weight, plain.linear.weight)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_cast_model_is_compiled(backend: str) -> None:
    model, plain = (one.float() for one in pair())
    ids = torch.tensor([13, 2, 299, 100])
    assert_same(torch.compile(model, backend=backend, fullgraph=True)(ids), plain(ids))
