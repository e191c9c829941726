"""A transformer on the CPU, in a process of its own: ``python transformer.py FILE SHAPE``.

FILE is a safetensors file, which torch runs without df11, or a container, which the checkout on PYTHONPATH loads. SHAPE
is a ``Shape`` as JSON. Each line on standard input is a question: a key of the ``answers`` in ``main``. Torch computes
with one thread; df11 decodes on all cores. This imports nothing of the benchmarks and uses no recent part of df11, so
that it runs on other checkouts.
"""

import ctypes
import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

HEAD = 64
"""Width of an attention head."""
TOKENS = 16
LAYER_CALLS = 50
"""Calls of one layer for a sample of its overhead: what is looked for is a small difference."""


class Shape(NamedTuple):
    """Blocks, width, vocabulary; whether the output layer is tied to the embedding."""

    blocks: int
    width: int
    vocabulary: int
    tied: bool


class Block(nn.Module):
    """Attention and a multilayer perceptron, side by side behind one norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        x = self.norm(hidden)
        projections = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in projections)
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = self.output(heads.transpose(1, 2).flatten(-2))
        result: torch.Tensor = hidden + attended + self.down(nn.functional.silu(self.up(x)))
        return result


class Transformer(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width) for _ in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.width)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.output.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look the tokens up, and go on from there."""
        return self.logits(self.embedding(ids))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From [batch, tokens, width]."""
        for block in self.blocks:
            hidden = block(hidden)
        result: torch.Tensor = self.output(self.norm(hidden))
        return result


def make(shape: Shape, device: str = "meta") -> Transformer:
    """The model, frozen, in BF16."""
    with torch.device(device):
        return Transformer(shape).to(torch.bfloat16).requires_grad_(False).eval()


def loader(path: Path) -> Callable[[Transformer], object]:
    """What fills a model from a file, with everything imported that it takes."""
    if path.suffix != ".safetensors":
        from df11.runtime import load_model

        return lambda model: load_model(model, path, "cpu")
    from safetensors.torch import load_file

    def load(model: Transformer) -> None:
        held = {name: values.clone() for name, values in load_file(path).items()}  # not mapped from the file
        if model.output.weight is model.embedding.weight:
            held["output.weight"] = held["embedding.weight"]
        model.load_state_dict(held, assign=True)

    return load


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process now, or with VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settle() -> int:
    """Give back to the system what is free; resident bytes then."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return resident()


def peak_of(call: Callable[[], object]) -> int:
    """The most resident bytes during a call."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    call()
    return resident("VmHWM")


def forward(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Logits; autograd keeps nothing."""
    with torch.no_grad():
        return model(ids)  # type: ignore[no-any-return]


def stored(tensor: Any) -> tuple[int, int]:
    """Address and bytes of a tensor's storage; of a compressed weight's record."""
    held = getattr(tensor, "compressed", None)
    storage = (tensor if held is None else held.record).untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def backward(model: Transformer, ids: torch.Tensor) -> tuple[dict[int, int], torch.Tensor]:
    """Address -> bytes of every storage that autograd keeps for a backward pass, and the gradient of the input."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address, size = stored(tensor)
        kept[address] = size
        return tensor

    hidden = model.embedding(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.logits(hidden)
    logits.sum().backward()
    assert hidden.grad is not None
    return kept, hidden.grad


def overhead(layer: Any) -> float:
    """Seconds that a call of a layer takes besides decoding its weight and multiplying: the median of some calls."""
    decode = layer.decode if hasattr(layer, "decode") else layer.weight.compressed.decode  # the older design, or this
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(decode(), requires_grad=False)
    x = torch.ones(1, TOKENS, layer.in_features, dtype=torch.bfloat16)
    found = []
    with torch.no_grad():
        for _ in range(LAYER_CALLS):
            whole, decoding, product = (seconds(lambda: layer(x)), seconds(decode), seconds(lambda: plain(x)))
            found.append(whole - decoding - product)
    return statistics.median(found)


def seconds(call: Callable[[], object]) -> float:
    """What a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 of the values of BF16 tensors."""
    data = (tensor.detach().contiguous().view(torch.int16).numpy() for tensor in tensors)
    return hashlib.sha256(b"".join(data)).hexdigest()


def main() -> None:
    """Load the model, measure memory, and answer the lines on standard input."""
    torch.set_num_threads(1)
    path, shape = Path(sys.argv[1]), Shape(*json.loads(sys.argv[2]))
    load = loader(path)
    ids = torch.arange(TOKENS).unsqueeze(0) * 7 % shape.vocabulary
    # Code that torch loads at its first use is no cost of this model; that of the meta device is 70 MiB.
    smallest = Shape(1, HEAD, shape.vocabulary, tied=False)
    make(smallest)
    small = make(smallest, "cpu")
    forward(small, ids)
    backward(small, ids)
    del small
    before = settle()
    model = make(shape)
    load(model)
    at_rest = settle()
    peak = peak_of(lambda: forward(model, ids))
    own = {stored(parameter)[0] for parameter in model.parameters()}
    kept, gradient = backward(model, ids)
    memory = {
        "at rest": at_rest - before,
        "peak of the first forward, above that": peak - at_rest,
        "kept for backward": sum(kept.values()),
        "kept for backward, beyond the model": sum(size for address, size in kept.items() if address not in own),
    }
    checksum = digest(forward(model, ids), gradient)
    answers: dict[str, Callable[[], object]] = {
        "memory": lambda: json.dumps(memory),
        "digest": lambda: checksum,
        "forward": lambda: seconds(lambda: forward(model, ids)),
        "overhead": lambda: overhead(model.blocks[0].query),
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
