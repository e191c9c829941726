"""The section ``dfloat11``: a model written in DFloat11's layout and read from it, beside ``cp``; and both sizes."""

from __future__ import annotations

import json
from typing import Final

from benchmarks import harness, measure, synthetic
from benchmarks.harness import Program
from benchmarks.sections import Bench, readable

BYTES: Final = 6e8


def dfloat11(bench: Bench) -> None:
    """``df11 export --to dfloat11`` and the import of what it wrote, in turns with ``cp`` of the BF16 model."""
    size = bench.bytes(BYTES)
    names = ("plain", "df11", "copy", "exported", "imported")
    plain, packed, copied, exported, imported = (bench.folder / name for name in names)
    plain.mkdir()
    synthetic.write_gaussian(plain / "model.safetensors", size)
    hidden = 256 if size < 100e6 else 1024  # As write_gaussian chooses it.
    (plain / "config.json").write_text(json.dumps({"hidden_size": hidden}) + "\n")
    checkout, options = bench.checkouts[0], ("-j", bench.jobs, "--quiet")
    harness.run(checkout.program("", "convert", plain, packed, *options, output=packed))
    export = ("export", "--to", "dfloat11", packed, exported, *options)
    programs = [
        checkout.program("export", *export, output=exported),
        Program("cp", ["cp", "-r", str(plain), str(copied)], copied),
    ]
    pairs = [(programs[0].name, "cp")]
    bench.board.turns(f"{readable(size)}, to DFloat11", programs[::-1], pairs, bench.rounds)
    programs[0] = checkout.program("import", "convert", exported, imported, *options, output=imported)
    pairs = [(programs[0].name, "cp")]
    bench.board.turns(f"{readable(size)}, from DFloat11", programs, pairs, bench.rounds)
    bf16 = measure.stored_bytes(plain, ".safetensors")
    for name, stored in (
        ("df11", measure.stored_bytes(packed, ".df11")),
        ("DFloat11, by df11", measure.stored_bytes(exported, ".safetensors")),
    ):
        bench.board.add(f"{readable(size)}: {name}", "of BF16", "lower", [stored / bf16], ratio=True)
