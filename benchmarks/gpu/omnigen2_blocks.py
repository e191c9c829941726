"""The blocks of OmniGen2's transformer, in torch alone: what its matrices are multiplied with, and in which order.

Not its code: nothing is fused, and samples are processed one by one. Shapes and the names of parameters are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Queries or keys [1, tokens, heads, head] turned by [tokens, head / 2] complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary[None, :, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    """Attention with rotary positions, and fewer heads for keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, kv_heads * self.head, bias=False)
        self.to_v = nn.Linear(width, kv_heads * self.head, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Dropout(0.0)])
        self.norm_q = nn.RMSNorm(self.head, eps=1e-5)
        self.norm_k = nn.RMSNorm(self.head, eps=1e-5)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Tokens [1, tokens, width]; rotary as for :func:`rotate`."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(self.norm_q(q), rotary), rotate(self.norm_k(k), rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        x = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)
        for layer in self.to_out:
            x = layer(x)
        return x


class FeedForward(nn.Module):
    """Gated, with SiLU in F32."""

    def __init__(self, width: int, multiple_of: int) -> None:
        super().__init__()
        inner = -(-4 * width // multiple_of) * multiple_of
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner, width, bias=False)
        self.linear_3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [1, tokens, width]."""
        gated = functional.silu(self.linear_1(x).float()).to(x.dtype) * self.linear_3(x)
        out: Tensor = self.linear_2(gated)
        return out


class ModulatedNorm(nn.Module):
    """A norm and what the time contributes: its scale, and gates and a scale for the rest of the block."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(min(width, 1024), 4 * width)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [1, tokens, width] and the time's embedding [1, min(width, 1024)]."""
        scale, gate, mlp_scale, mlp_gate = self.linear(functional.silu(time))[:, None].chunk(4, dim=-1)
        return self.norm(x) * (1 + scale), gate, mlp_scale, mlp_gate


class Block(nn.Module):
    """Attention and feed-forward between norms; ``modulated`` by the time."""

    def __init__(self, width: int, heads: int, kv_heads: int, multiple_of: int, eps: float, *, modulated: bool) -> None:
        super().__init__()
        self.modulated = modulated
        self.attn = Attention(width, heads, kv_heads)
        self.feed_forward = FeedForward(width, multiple_of)
        self.norm1 = ModulatedNorm(width, eps) if modulated else nn.RMSNorm(width, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps=eps)
        self.norm2 = nn.RMSNorm(width, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, rotary: Tensor, time: Tensor | None = None) -> Tensor:
        """Tokens [1, tokens, width]."""
        if not self.modulated:
            x = x + self.norm2(self.attn(self.norm1(x), rotary))
            plain: Tensor = x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
            return plain
        normed, gate, mlp_scale, mlp_gate = self.norm1(x, time)
        x = x + gate.tanh() * self.norm2(self.attn(normed, rotary))
        out: Tensor = x + mlp_gate.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + mlp_scale)))
        return out


class Transformer(nn.Module):
    """All blocks: of the text, of the image, and of both. ``config``: OmniGen2's transformer/config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        names = ("hidden_size", "num_attention_heads", "num_kv_heads", "multiple_of", "norm_eps")
        width, heads, kv_heads, multiple_of, eps = (config[name] for name in names)

        def blocks(count: str, *, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, heads, kv_heads, multiple_of, eps, modulated=modulated) for _ in range(config[count])
            )

        self.context_refiner = blocks("num_refiner_layers", modulated=False)
        self.noise_refiner = blocks("num_refiner_layers")
        self.layers = blocks("num_layers")
