"""Texts from strangers: index files, job files, results files, addresses."""

from __future__ import annotations

import json
from random import Random

from df11.converter.files import container_name, original_name
from df11.converter.index import read_shards, rewrite_index
from df11.formats import errors
from df11.pipelines.job import read_job
from df11.pipelines.results import read_results
from df11.storage import names
from df11.storage.address import Address, is_address, is_safe_path
from tests.fuzz.containers import in_a_file
from tests.fuzz.edits import TEXTS, edit_json_text, edit_text
from tests.fuzz.oracle import Fault, Target


def _edit_json(data: bytes, random: Random) -> bytes:
    return edit_text(data, random) if random.random() < 0.25 else edit_json_text(data, random)


# Index files.


def _to_shard(name: str) -> str:
    return original_name(name, {})


def rewrite(data: bytes) -> None:
    """Rewriting changes nothing but names, and rewriting back restores the bytes."""
    shards = read_shards(data, "a")
    there = rewrite_index(data, container_name, "a")
    if read_shards(there, "a") != {tensor: container_name(name) for tensor, name in shards.items()}:
        raise Fault("the rewritten index names other shards")
    reversible = all(_to_shard(container_name(name)) == name for name in shards.values())
    if reversible and rewrite_index(there, _to_shard, "a") != data:
        raise Fault("rewriting back gives other bytes")


def _indexes() -> list[bytes]:
    document = {
        "metadata": {"total_size": 10, "weight_map": {"a": "a.safetensors"}},
        "weight_map": {"a": "m-1.safetensors", 'b"\n': "sub/m-2.safetensors", "weight_map": "x.bin"},
        "more": [{"weight_map": 1}, 1.5, None],
    }
    escaped = b'{"weight_map":{"a":"sub\\/\\u0061\\u002esafetensors"}}'
    return [json.dumps(document).encode(), json.dumps(document, indent=2).encode(), escaped]


# Job files.


def open_job(data: bytes) -> None:
    """A job has models with distinct targets."""
    job = read_job(in_a_file(data, "job.toml"))
    if not job.models or len({model.target for model in job.models}) != len(job.models):
        raise Fault("a job without models, or two with the same target")
    if job.limits.memory < 0 or job.shards_per_commit < 1:
        raise Fault("limits below nothing")
    for model in job.models:
        if is_address(model.source) and str(Address.parse(model.source)) != model.source:
            raise Fault("an address that is spelt in another way when read again")


_JOB = """
[limits]
memory = "300MiB"
disk = "10GB"
threads = 2
work = "work"

[upload]
shards_per_commit = 2

[[model]]
source = "hf://owner/name"
revision = "main"
target = "hf://me/name-df11"
cast = "bf16"
private = true
include = ["*.safetensors", "*.json"]
exclude = ["x/"]
allow_missing = true

[model.card]
license = "mit"
tags = ["a", "b"]
results = "results.json"

[[model]]
source = "a folder"
target = "~/b"
"""
_LINES = (
    *("[[model]]", "[model]", "[model.card]", "[limits]", "[upload]", "[upload.more]", "[[limits]]"),
    *('source = "hf://a/b@refs/pr/1"', 'target = "hf://a/b@x"', 'target = "hf://A/B"', 'target = "."', 'target = ""'),
    *('source = "\\u0000"', 'source = "~nobody-at-all/x"', 'memory = "1e400GB"', 'memory = "-1"', "threads = true"),
    *("threads = 9223372036854775808", 'disk = "99999999999999999999TiB"', 'work = "$HOME/${X}"', "include = [1]"),
    *("a.b.c = 1979-05-27T07:32:00Z", "x = 0x7f", "x = inf", "x = 1_000", "x = '''\n'''", "x = {a = [{b = 1}]}"),
    *(
        "language = []",
        "results = '\\'",
        "private = 1",
        'cast = "fp8"',
        '"" = 1',
        "'\u202e' = 1",
        'revision = "a\u2028b"',
    ),
)


def _edit_job(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines) + 1)
    match random.randrange(6):
        case 0:
            return edit_text(data, random)
        case 1:
            del lines[at : at + 1]
        case 2:
            lines[at:at] = lines[at : at + random.choice((1, 4, 12))]
        case 3 if at < len(lines) and b"=" in lines[at]:
            value = json.dumps(random.choice(TEXTS)).encode()
            lines[at] = lines[at].partition(b"=")[0] + b"= " + random.choice((value, b"[" + value + b"]", b"-1", b"{}"))
        case _:
            lines.insert(at, random.choice(_LINES).encode())
    return b"\n".join(lines)


# Results files.


def open_results(data: bytes) -> None:
    """Every row has a cell for each column."""
    results = read_results(in_a_file(data, "results.json"))
    if any(len(row) != len(results.columns) for row in results.rows):
        raise Fault("a row with another number of cells")


def _results() -> list[bytes]:
    row = {"what": "image", "name": "df11", "seconds": 1.5, "of_bf16": 1.01, "peak_bytes": 10**10}
    document = {
        "machine": {"gpu": {"name": "GPU", "memory_bytes": 1}, "date": "2026-11-01T00:00:00Z"},
        "sections": {"image": {"rows": [row, row | {"seconds": 1e-9}]}, "text": {"rows": [row]}},
    }
    return [json.dumps(document).encode()]


# Addresses and names.


def read_address(data: bytes) -> None:
    """An address is spelt in one way when it is read again; a name is decided upon quickly."""
    text = data.decode("utf-8", "surrogateescape")
    names.is_left_out(text)
    names.remarks_on([text])
    names.is_wanted(text, [text], [])
    is_safe_path(text)
    try:
        address = Address.parse(text)
    except errors.UsageError:
        if not is_address(text):
            return
        raise
    if Address.parse(str(address)) != address:
        raise Fault("an address that is another one when read again")


def _addresses() -> list[bytes]:
    return [b"hf://owner/name", b"hf://owner/name@main/a/b", b"hf://o/n@refs/pr/1/x", b"hf://o/n@a%2Fb", b"a/.git/b~"]


def _edit_address(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    pieces = (b"@", b"/", b"refs", b"refs/pr/1", b"%2F", b"%", b"..", b"*", b"[!", b"]", b"~", b".git", b"\xff", b" ")
    return data[:at] + random.choice(pieces) + data[at + random.randrange(3) :]


INDEX = Target("index", _indexes, _edit_json, rewrite, 8 << 10)
JOB = Target("job", lambda: [_JOB.encode()], _edit_job, open_job, 8 << 10)
RESULTS = Target("results", _results, _edit_json, open_results, 8 << 10)
ADDRESS = Target("address", _addresses, _edit_address, read_address, 1 << 10)
