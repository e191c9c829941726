"""Small models for jobs: shards, an index, configs, a model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from df11.converter import parquet
from df11.converter.manifest import FILE_NAME
from df11.pipelines.card import CardFields
from df11.pipelines.job import Job, Limits, Model
from tests.support import sources
from tests.support.hub.repository import Repository

CARD = b"""---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
library_name: transformers
tags:
- small
---
# A model
"""


def shard(number: int, dtype: str = "BF16", rows: int = 300) -> bytes:
    """A shard of two layers' weights."""
    make = sources.bf16 if dtype == "BF16" else sources.f32
    return sources.file_bytes(
        [
            make(f"model.layers.{number}.mlp.weight", (rows, 256), seed=number),
            make(f"model.layers.{number}.norm.weight", (256,), seed=100 + number),
            sources.random_tensor(f"model.layers.{number}.table", "I64", (5,), seed=number),
        ]
    )


def model(shards: int = 3, dtype: str = "BF16", rows: int = 300) -> dict[str, bytes]:
    """The files of a model with this many shards."""
    files = {
        f"model-{number:05}-of-{shards:05}.safetensors": shard(number, dtype, rows) for number in range(1, shards + 1)
    }
    weight_map = {}
    for number, name in enumerate(files, 1):
        weight_map |= {f"model.layers.{number}.{part}": name for part in ("mlp.weight", "norm.weight", "table")}
    index = {"metadata": {"total_size": sum(map(len, files.values()))}, "weight_map": weight_map}
    return {
        **files,
        "model.safetensors.index.json": json.dumps(index, indent=2).encode(),
        "config.json": b'{"architectures": ["SmallForCausalLM"], "model_type": "small"}\n',
        "tokenizer/tokenizer.json": b'{"text": "' + b"a" * (2 << 20) + b'"}\n',  # Too large for the last commit.
        "LICENSE": b"Apache-2.0\n",
        "README.md": CARD,
    }


def a_job(
    source: str,
    target: str,
    work: Path,
    *,
    cast: str | None = None,
    private: bool | None = None,
    shards_per_commit: int = 1,
    disk: int | None = None,
    exclude: tuple[str, ...] = (),
) -> Job:
    """A job with one model."""
    assert cast in (None, "bf16")
    one = Model(source, target, cast, private, (), exclude, False, CardFields())  # type: ignore[arg-type]
    return Job((one,), Limits(300 << 20, disk, 2, work), shards_per_commit)


def comparable(repository: Repository) -> dict[str, object]:
    """What two targets of the same model have in common: all but the model card, which names its repository."""
    found: dict[str, object] = {**repository.hashes()}
    card = str(found.pop("README.md"))
    manifest = parquet.from_bytes(repository.read(FILE_NAME), FILE_NAME)
    others = dict(manifest.others)
    assert others.pop("README.md") == card
    return found | {FILE_NAME: dataclasses.replace(manifest, others=tuple(others.items()))}


def source_files(repository: Repository) -> dict[str, bytes]:
    """The files of a source that come back when its conversion is restored."""
    return {name: data for name, data in repository.files().items() if name.endswith(".safetensors")}
