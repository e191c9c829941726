"""What runs inside the peers' own virtual environment: programs that have no command line of their own, and their cores.

``python peer_worker.py COMMAND...``. Only the standard library and the peers: this file is not imported by the other modules.
"""

import contextlib
import importlib.util
import io
import json
import sys
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

LMZIP_CHUNK = 8 << 20
"""lmzip's default chunk."""
DFLOAT11_LAYOUT = {"bytes_per_thread": 8, "threads_per_block": 512}
"""The constants of dfloat11 0.5.0."""


def versions() -> dict[str, str]:
    """Installed versions, and for peers that do not import the reason."""
    found = {}
    for name in ("lmzip", "zipnn", "dfloat11", "zstandard", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def zipnn_compress(source: str, target: str) -> None:
    """Compress a whole file as BF16 bytes with zipnn, all cores."""
    import zipnn  # type: ignore[import-not-found]

    Path(target).write_bytes(zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte").compress(Path(source).read_bytes()))


def zipnn_decompress(source: str, target: str) -> None:
    """Restore a file that zipnn compressed."""
    import zipnn

    Path(target).write_bytes(zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte").decompress(Path(source).read_bytes()))


def zstd_compress(source: str, target: str) -> None:
    """Level 3, all cores, with a content checksum, as a stream."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3, threads=-1, write_checksum=True)
    with open(source, "rb") as reader, open(target, "wb") as writer:
        compressor.copy_stream(reader, writer, size=Path(source).stat().st_size, read_size=1 << 20, write_size=1 << 20)


def zstd_decompress(source: str, target: str) -> None:
    """Decompress as a stream; zstd has no threads for it."""
    import zstandard

    with open(source, "rb") as reader, open(target, "wb") as writer:
        zstandard.ZstdDecompressor().copy_stream(reader, writer, read_size=1 << 20, write_size=1 << 20)


def lmzip_core(path: str, repeats: str) -> dict[str, Any]:
    """The chunk coder of lmzip, one thread, CRC-32 as by default: best seconds of ``repeats`` for a file of raw BF16 weights."""
    from lmz import codec, planner  # type: ignore[import-not-found]

    data = Path(path).read_bytes()
    chunks = [data[start : start + LMZIP_CHUNK] for start in range(0, len(data), LMZIP_CHUNK)]
    encode, decode, stored = [], [], 0
    for _ in range(int(repeats)):
        start = time.perf_counter()
        encoded = [codec.encode_chunk(chunk, 2, kind=planner.KIND_BF16) for chunk in chunks]
        encode.append(time.perf_counter() - start)
        payloads = [b"".join(parts) if isinstance(parts, list) else bytes(parts) for parts, *_ in encoded]
        stored = sum(map(len, payloads))
        seconds = 0.0
        for chunk, payload, (_, kind, flags, crc) in zip(chunks, payloads, encoded, strict=True):
            start = time.perf_counter()
            result = codec.decode_chunk(payload, kind, 2, flags, len(chunk), crc)
            seconds += time.perf_counter() - start
            if bytes(result) != chunk:
                raise SystemExit("lmzip does not restore the chunk")
        decode.append(seconds)
    return {"encode": min(encode), "decode": min(decode), "stored": stored}


def zipnn_core(path: str, repeats: str) -> dict[str, Any]:
    """The byte interface of zipnn with one thread, which keeps no checksum: best seconds of ``repeats`` for a file of raw BF16 weights."""
    import zipnn

    encode, decode, stored = [], [], 0
    for _ in range(int(repeats)):
        data = Path(path).read_bytes()  # anew each time: compress() overwrites its input
        codec = zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
        start = time.perf_counter()
        packed = codec.compress(data)
        encode.append(time.perf_counter() - start)
        start = time.perf_counter()
        restored = codec.decompress(packed)
        decode.append(time.perf_counter() - start)
        stored = len(packed)
        if bytes(restored) != Path(path).read_bytes():
            raise SystemExit("zipnn does not restore the data")
    return {"encode": min(encode), "decode": min(decode), "stored": stored}


def dfloat11_core(path: str, repeats: str) -> dict[str, Any]:
    """dfloat11's own encoder for a file of raw BF16 weights: everything that it stores of one unit, and the seconds that it took.

    Its module is loaded alone: the package does not import without a GPU, nor on current versions of what it needs.
    """
    import torch

    encoder = _dfloat11_encoder()
    weights = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.bfloat16)
    seconds, stored = [], 0
    for _ in range(int(repeats)):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            _, counter = encoder.get_codec(weights)
            codec, _, code_table = encoder.get_32bit_codec(counter)
            tables = encoder.get_luts(code_table)
            parts = encoder.encode_weights([weights], codec, **DFLOAT11_LAYOUT)
        seconds.append(time.perf_counter() - start)
        stored = sum(part.numel() * part.element_size() for part in (tables, *parts))
    return {"encode": min(seconds), "decode": None, "stored": stored}


def _dfloat11_encoder() -> Any:
    files = metadata.files("dfloat11") or []
    path = next(str(file.locate()) for file in files if file.name == "dfloat11_utils.py")
    sys.modules.setdefault("tqdm", types.SimpleNamespace(tqdm=lambda data: data))  # type: ignore[arg-type]
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS: dict[str, Callable[..., Any]] = {
    "versions": versions,
    "zipnn-compress": zipnn_compress,
    "zipnn-decompress": zipnn_decompress,
    "zstd-compress": zstd_compress,
    "zstd-decompress": zstd_decompress,
    "lmzip-core": lmzip_core,
    "zipnn-core": zipnn_core,
    "dfloat11-core": dfloat11_core,
}

if __name__ == "__main__":
    answer = COMMANDS[sys.argv[1]](*sys.argv[2:])
    if answer is not None:
        print(json.dumps(answer))
