"""Checkpoints of DFloat11: a config.json, and a file with a unit of two layers, a plain one, and a bias."""

from __future__ import annotations

import functools
import json
from random import Random

import numpy as np

import df11
from tests.fuzz.containers import edit_source, in_a_file
from tests.fuzz.edits import edit_bytes, edit_json_text
from tests.fuzz.oracle import Fault, Target
from tests.support import dfloat11, sources
from tests.support.sources import bf16, gaussian

THREADS = 32


def _joined(config: bytes, file: bytes) -> bytes:
    return len(config).to_bytes(4, "little") + config + file


def _split(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:4], "little")
    return data[4 : 4 + size], data[4 + size :]


@functools.cache
def _seeds() -> list[bytes]:
    found = []
    for end, codes in ((True, None), (False, None), (True, {10: "0", 11: "10", 12: "1" * 9, dfloat11.END: "110"})):
        exponents = [10, 10, 11, 12] * 300
        both = gaussian(1200, 1) if codes is None else dfloat11.with_exponents(exponents)
        unit = dfloat11.encode([both[:480], both[480:]], THREADS, codes=codes, end=end)
        one = dfloat11.encode([gaussian(300, 2)], THREADS, end=end)
        tensors = [*dfloat11.tensors("b.0", unit), *dfloat11.tensors("lm_head", one), bf16("b.0.x.bias", (12,))]
        tensors += [bf16("b.0.y.bias", (9,)), bf16("n", (5,))]
        config = dfloat11.config({r"b\.\d+": ["x", "y"], "lm_head": []}, THREADS, hidden_size=20)
        found.append(_joined(json.dumps(config).encode(), sources.file_bytes(tensors)))
    return found


def _edit(data: bytes, random: Random) -> bytes:
    config, file = _split(data)
    match random.randrange(4):
        case 0:
            config = edit_json_text(config, random)
        case 1:
            file = edit_source(file, random)
        case _:  # The units themselves.
            start = 8 + int.from_bytes(file[:8], "little")
            file = file[:start] + edit_bytes(file[start:], random)[: len(file) - start].ljust(len(file) - start, b"\0")
    return _joined(config, file)


def import_checkpoint(data: bytes) -> None:
    """Whatever is accepted decodes to what DFloat11's kernel would find, and its container is sound."""
    config, file = _split(data)
    folder = in_a_file(b"", "checkpoint.txt").with_name("checkpoint")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(file)
    target = folder.with_name("checkpoint-df11")
    for old in target.glob("*"):
        old.unlink()
    df11.convert(folder, target, threads=1)
    containers = list(target.glob("*.df11"))
    found = {}
    for path in containers:
        df11.verify(path, threads=1)
        with df11.open(path) as container:
            if not container.made_from:
                return  # It was taken for an ordinary model.
            found |= {name: container.tensor(name) for name in container.keys() if container.info(name).dtype == "BF16"}
    units, _ = dfloat11.read_units(folder)
    threads = json.loads(config)["dfloat11_config"]["threads_per_block"][0]
    for name, parts in units.items():
        try:
            weights = np.concatenate(dfloat11.decode(parts, threads))
        except AssertionError:  # That reader wants more than the weights: that the kernel ends, in 48 KiB.
            continue
        mine = [key for key in found if key.startswith(f"{name}.") and key.endswith(".weight")]
        own = np.concatenate([found[key].reshape(-1) for key in mine])
        if not np.array_equal(np.sort(weights), np.sort(own)):
            raise Fault(f"{name} decodes to other weights than the kernel finds")


CHECKPOINT = Target("checkpoint", _seeds, _edit, import_checkpoint, 32 << 10)
