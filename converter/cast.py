"""Which F32 tensors ``--cast bf16`` rounds, and whether a container agrees with a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, Literal

from df11.formats import errors

Cast = Literal["bf16"] | None
"""The dtype that F32 tensors are rounded to."""

PRESETS: Final[Mapping[str, tuple[str, ...]]] = {
    "@anyflow": ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    "@chronoedit": ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    "@cosmos": ("learnable_pos_embed",),
    "@kandinsky": ("time_embeddings", "modulation", "visual_modulation", "text_modulation"),
    "@skyreels": ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
    "@t5": ("wo",),
    "@wan": ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
}
"""Modules that diffusers and transformers keep in F32 when they load a model as BF16, by the name of a preset: what
``_keep_in_fp32_modules`` of the model's class lists. Each is a part, between dots, of its tensors' names."""


def expand(keep: Sequence[str]) -> tuple[str, ...]:
    """Patterns of tensors' names, with those of a preset in the place of its name. Raises a UsageError."""
    patterns: list[str] = []
    for pattern in keep:
        if pattern.startswith("@") and pattern not in PRESETS:
            raise errors.UsageError("no such preset of tensors to keep", expected=", ".join(PRESETS), found=pattern)
        for part in PRESETS.get(pattern, ()):
            patterns += [part, f"{part}.*", f"*.{part}", f"*.{part}.*"]
        patterns += [] if pattern in PRESETS else [pattern]
    return tuple(patterns)


def is_rounded(name: str, cast: Cast, keep: Sequence[str]) -> bool:
    """Whether the F32 tensor ``name`` is rounded; ``keep``: expanded patterns of those that are not."""
    return cast == "bf16" and not any(fnmatchcase(name, pattern) for pattern in keep)


def agrees(name: str, exact: bool | None, cast: Cast, keep: Sequence[str]) -> bool:
    """Whether an F32 tensor is stored as these options want it. ``exact``: as in a tensor object, None for F32."""
    return exact is not None if is_rounded(name, cast, keep) else exact is not False
