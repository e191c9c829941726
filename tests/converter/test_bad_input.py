"""Bad input, bad places and bad luck: one line, the right exit code, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import safetensors

import df11
from df11.formats import errors
from tests.support import commands, sources
from tests.support.sources import SEGMENT, Tensor, bf16, f32, framed, random_tensor, tree_bytes

GOOD = sources.file_bytes([bf16("a", (2, 300)), random_tensor("b", "U8", (10,), 1)], metadata={"format": "pt"})
DATA = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]


def document(**changes) -> bytes:
    """A file with one tensor of 8 bytes, some of whose entry's members are changed."""
    return framed(
        json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]} | changes}).encode(), bytes(8)
    )


def entries(*ranges: tuple[int, int], size: int) -> bytes:
    """A file of U8 tensors with these byte ranges."""
    table = {
        f"t{index}": {"dtype": "U8", "shape": [max(end - start, 0)], "data_offsets": [start, end]}
        for index, (start, end) in enumerate(ranges)
    }
    return framed(json.dumps(table).encode(), bytes(size))


# What the safetensors library refuses, too.
BAD = {
    "empty": b"",
    "7 bytes": bytes(7),
    "only the size of a header": (16).to_bytes(8, "little"),
    "a text": b"This is not a safetensors file.\n" * 100,
    "a pickle": b"PK\x03\x04" + bytes(2000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(2000),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n",
    "header size beyond the file": (len(GOOD) - 7).to_bytes(8, "little") + GOOD[8:],
    "header size beyond the limit": (100_000_001).to_bytes(8, "little") + GOOD[8:],
    "header size of 64 bits": b"\xff" * 8 + GOOD[8:],
    "header of no size": bytes(8),
    "truncated in the header": GOOD[:60],
    "truncated by one byte": GOOD[:-1],
    "truncated to half": GOOD[: len(GOOD) // 2],
    "a byte too many": GOOD + b"\0",
    "no JSON": framed(b"{nonsense", DATA),
    "cut JSON": framed(b'{"a":', b""),
    "JSON of something else": framed(b"[1, 2]", b""),
    "text after the JSON": framed(b"{}{}", b""),
    "not UTF-8": framed(b'{"\xff":{}}', b""),
    "half a surrogate": framed(rb'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    "deep JSON": framed(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b""),
    "metadata no object": framed(b'{"__metadata__":[]}', b""),
    "metadata no text": framed(b'{"__metadata__":{"a":1}}', b""),
    "metadata of null": framed(b'{"__metadata__":{"a":null}}', b""),
    "tensor of null": framed(b'{"a":null}', b""),
    "no dtype": framed(b'{"a":{"shape":[0],"data_offsets":[0,0]}}', b""),
    "no shape": framed(b'{"a":{"dtype":"U8","data_offsets":[0,0]}}', b""),
    "no offsets": framed(b'{"a":{"dtype":"U8","shape":[0]}}', b""),
    "unknown dtype": document(dtype="BF17"),
    "dtype of null": document(dtype=None),
    "dtype in a list": document(dtype=["BF16"]),
    "another dtype": document(dtype="F32"),
    "another shape": document(shape=[5]),
    "shape of text": document(shape=["4"]),
    "shape a number": document(shape=4),
    "shape of a fraction": document(shape=[4.0]),
    "shape below zero": document(shape=[-4]),
    "shape true": document(shape=[True, 4]),
    "shape beyond 64 bits": document(shape=[1 << 64, 0]),
    "shape whose product overflows": document(shape=[1 << 62, 1 << 62]),
    "offsets below zero": document(data_offsets=[-8, 0]),
    "offsets reversed": document(data_offsets=[8, 0]),
    "offsets of fractions": document(data_offsets=[0.0, 8.0]),
    "one offset": document(data_offsets=[8]),
    "three offsets": document(data_offsets=[0, 4, 8]),
    "offsets beyond 64 bits": document(data_offsets=[1 << 64, (1 << 64) + 8]),
    "offsets beyond the file": document(data_offsets=[8, 16]),
    "ranges that overlap": entries((0, 10), (5, 15), size=15),
    "ranges that are the same": entries((0, 10), (0, 10), size=10),
    "a range in a range": entries((0, 10), (2, 5), size=10),
    "a hole": entries((0, 10), (12, 20), size=20),
    "a hole at the start": entries((4, 10), size=10),
    "a hole at the end": entries((0, 10), size=12),
    "an element of part of a byte": framed(b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
}
# What only df11 refuses, as SPEC.md or the documentation says.
STRICT = {
    "the same name twice": framed(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
    ),
    "65 dimensions": document(shape=[4] + [1] * 64),
}


@pytest.mark.parametrize("case", [*BAD, *STRICT])
def test_a_bad_source_is_refused(case, tmp_path):
    data = (BAD | STRICT)[case]
    source = tmp_path / "bad.safetensors"
    source.write_bytes(data)
    if case in BAD:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(data)
    commands.run("convert", source, tmp_path / "x.df11").error(2, source)
    commands.run("convert", source, tmp_path / "x.df11", "--dry-run").error(2, source)
    with pytest.raises(df11.Df11Error):
        df11.convert(source, tmp_path / "x.df11")
    assert set(tree_bytes(tmp_path)) == {"bad.safetensors"}


def test_the_good_source_of_these_tests_is_good(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(GOOD)
    (tmp_path / "small.safetensors").write_bytes(document())
    (tmp_path / "ranges.safetensors").write_bytes(entries((0, 10), (10, 15), size=15))
    for path in tmp_path.glob("*.safetensors"):
        commands.run("convert", path, path.with_suffix(".df11")).fine()


def test_the_error_names_the_tensor_and_what_to_do(tmp_path):
    source = tmp_path / "bad.safetensors"
    source.write_bytes(BAD["a hole"])
    commands.run("convert", source, tmp_path / "x").error(2, "tensor 't1'", "hole", "expected 10", "found 12")
    source.write_bytes(BAD["truncated by one byte"])
    commands.run("convert", source, tmp_path / "x").error(2, "tensor 'b'", "again")


def test_a_bad_shard_is_found_before_anything_is_written(tmp_path):
    for name in ("a", "b", "z"):
        sources.write(tmp_path / "model" / f"{name}.safetensors", [bf16("w", (700,))])
    path = tmp_path / "model" / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    commands.run("convert", tmp_path / "model", tmp_path / "out").error(2, path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_header_that_no_container_could_hold_is_refused(tmp_path):
    # The container's header holds each name twice: it must stay within the limit of its readers.
    source = sources.write(tmp_path / "x.safetensors", [Tensor("x" * 51_000_000, "U8", (1,), b"x")])
    with pytest.raises(df11.Df11Error) as caught:
        df11.convert(source, tmp_path / "x.df11", max_memory="16GiB")
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    source.unlink()


def test_a_header_that_memory_could_not_hold_is_refused(tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [Tensor("x" * 12_000_000, "U8", (1,), b"x")])
    commands.run("convert", source, tmp_path / "x.df11").error(6, source, "--max-memory")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    commands.run("convert", source, tmp_path / "x.df11", "--max-memory", "16GiB").fine()
    for path in tmp_path.iterdir():
        path.unlink()


# Paths.


def test_a_missing_source(tmp_path):
    commands.run("convert", tmp_path / "none.safetensors", tmp_path / "x.df11").error(4, "none.safetensors")
    commands.run("convert", tmp_path / "none" / "deep", tmp_path / "out").error(4, "deep")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_source_that_is_no_file(kind, tmp_path):
    source = tmp_path / "pipe" if kind == "pipe" else "/dev/null"
    if kind == "pipe":
        os.mkfifo(source)
    result = commands.run("convert", source, tmp_path / "x.df11")
    assert result.code in (2, 4)
    result.error(result.code, source)
    assert not (tmp_path / "x.df11").exists()


@pytest.fixture
def source(tmp_path):
    """A good source of a little more than one segment."""
    return sources.write(tmp_path / "x.safetensors", [bf16("w", (SEGMENT + 5000,))])


@pytest.fixture
def read_only(tmp_path):
    """A folder that cannot be written to. For root, which may write anywhere, it is a read-only file system."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
    else:
        mount(folder, "ro")
        yield folder
        subprocess.run(["umount", folder], check=True)


def mount(folder, options) -> None:
    """Mount an empty file system in memory. Skip the test if even root cannot."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")


@pytest.mark.parametrize("target", ["x.df11", "deep/er/x.df11"])
def test_a_folder_that_cannot_be_written(target, source, read_only):
    commands.run("convert", source, read_only / target).error(3, read_only)
    assert list(read_only.iterdir()) == []


def test_a_source_that_may_not_be_read(source, tmp_path, monkeypatch):
    honest = os.open

    def refuse(path, *arguments, **options):
        if str(path) == str(source):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return honest(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    commands.run("convert", source, tmp_path / "x.df11").error(3, source)


def test_a_folder_that_cannot_be_listed(source, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    commands.run("convert", source.parent, tmp_path.parent / "never").error(3, source.parent)


@pytest.mark.parametrize(
    "target", ["x.safetensors/x.df11", "x.safetensors/deep/x.df11", "/proc/none/x.df11", "/dev/null/x.df11"]
)
def test_a_target_below_what_is_no_folder(target, source, tmp_path):
    result = commands.run("convert", source, tmp_path / target)
    assert result.code in (2, 3, 4)
    result.error(result.code, "null" if "null" in target else target.removesuffix("/x.df11"))
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


def test_a_folder_where_the_file_should_be(source, tmp_path):
    (tmp_path / "model").mkdir()
    source.rename(tmp_path / "model" / "x.safetensors")
    (tmp_path / "out" / "x.df11").mkdir(parents=True)
    for force in ([], ["--force"]):
        commands.run("convert", tmp_path / "model", tmp_path / "out", *force).error(2, tmp_path / "out" / "x.df11")
        assert [path.name for path in (tmp_path / "out").rglob("*")] == ["x.df11"]


def test_a_name_that_is_too_long(source, tmp_path):
    commands.run("convert", source, tmp_path / ("x" * 300)).error(2, "xxx")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


# No space.


@pytest.mark.parametrize("command", ["convert", "restore"])
def test_a_disk_that_is_full(command, source, tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can mount a small file system; test_a_write_that_fails does the same without one")
    container, disk = tmp_path / "x.df11", tmp_path / "disk"
    df11.convert(source, container)
    disk.mkdir()
    mount(disk, "size=1m")
    try:
        origin = source if command == "convert" else container
        commands.run(command, origin, disk / "y").error(6, disk, "not enough disk space")  # Known before.
        monkeypatch.setattr("df11.storage.local.LocalStore.free_bytes", lambda _: None)
        commands.run(command, origin, disk / "y").error(6, disk / "y", "space")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 6), (errno.EDQUOT, 6), (errno.EFBIG, 6), (errno.EIO, 2), (errno.EROFS, 3)]
)
@pytest.mark.parametrize("good_writes", [0, 1])
@pytest.mark.parametrize("command", ["convert", "restore"])
def test_a_write_that_fails(command, good_writes, number, code, source, tmp_path, monkeypatch):
    container, target = tmp_path / "x.df11", tmp_path / "y"
    df11.convert(source, container)
    writes = 0
    pwrite = os.pwrite

    def fail(*arguments):
        nonlocal writes
        writes += 1
        if writes > good_writes:
            raise OSError(number, os.strerror(number))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fail)
    commands.run(command, source if command == "convert" else container, target).error(
        code, target, os.strerror(number)
    )
    assert writes == good_writes + 1
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11"}


def test_a_flush_that_fails(source, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    commands.run("convert", source, tmp_path / "y.df11").error(6, "y.df11", "space")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


def test_a_limit_of_the_size_of_files(source, tmp_path):
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000000,) * 2); "
    code += "from df11.__main__ import main; main()"
    commands.run_process("convert", source, tmp_path / "y.df11", command=[sys.executable, "-c", code]).error(
        6, "y.df11"
    )
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


@pytest.mark.parametrize("options", [[], ["--cast", "bf16"]])
def test_too_little_memory(options, tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [bf16("w", (SEGMENT,)), f32("f", (SEGMENT,), 1)])
    line = commands.run("convert", source, tmp_path / "x.df11", "--max-memory", "1MiB", *options).error(
        6, source, "--max-memory"
    )
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}
    # The size that it asks for is enough; a little less is not.
    needed = int(re.search(r"at least (\d+)MiB", line).group(1))
    commands.run("convert", source, tmp_path / "x.df11", "--max-memory", f"{needed - 1}MiB", *options).error(6)
    commands.run("convert", source, tmp_path / "x.df11", "--max-memory", f"{needed}MiB", *options).fine()


# A source that changes.


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


def touch(path):
    os.utime(path, ns=(1, 1))


def shorten(path):
    os.truncate(path, path.stat().st_size - 5_000_000)


def rewrite(path):
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("change", [append, touch, shorten, rewrite])
def test_a_source_that_changes_while_it_is_read(change, tmp_path):
    source = sources.write(tmp_path / "x.safetensors", [bf16("a", (3 * SEGMENT,))])
    os.utime(source, ns=(10**18, 10**18))
    changed = []

    def once(_):
        if not changed:
            changed.append(True)
            change(source)

    with pytest.raises(errors.ConflictError, match=r"x\.safetensors.*changed") as caught:
        df11.convert(source, tmp_path / "x.df11", threads=1, on_progress=once)
    assert caught.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", ["deferred", "noise"])
def test_a_tensor_that_is_read_twice_must_be_the_same_twice(name, tmp_path):
    # Not even the times of the file give the change away.
    tensors = [
        bf16("a", (SEGMENT,)),
        random_tensor("deferred", "U8", (1001,), 1),
        random_tensor("noise", "BF16", (SEGMENT,), 2),
        bf16("b", (SEGMENT,), 3),
    ]
    source = sources.write(tmp_path / "x.safetensors", tensors)
    data = source.read_bytes()
    offset = data.index(next(tensor for tensor in tensors if tensor.name == name).data) + 900
    before = source.stat().st_mtime_ns
    read = 0

    def change_what_was_read(size):
        nonlocal read
        read += size
        if read > 2 * SEGMENT * 3 - 10_000:
            with source.open("r+b") as file:
                os.pwrite(file.fileno(), bytes([data[offset] ^ 1]), offset)
            os.utime(source, ns=(before, before))

    with pytest.raises(errors.ConflictError) as caught:
        df11.convert(source, tmp_path / "x.df11", threads=1, on_progress=change_what_was_read)
    assert caught.value.tensor == name
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_read_that_fails(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    commands.run("convert", source, tmp_path / "y.df11").error(2, source, os.strerror(errno.EIO))
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


def test_no_memory(source, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("df11.converter.encode.SegmentEncoder.encode", fail)
    commands.run("convert", source, tmp_path / "y.df11").error(6, "--threads")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


# Defects in df11 itself, or in the machine.


@pytest.fixture
def wrong_encoder(monkeypatch):
    """An encoder that sometimes writes a wrong byte, before any checksum is taken."""
    from df11.converter.kernels import Encoder

    right = Encoder.encode_tiles

    def encode_tiles(self, weights, kind, left_out, code, lane_bytes, sections, end, out):
        result = right(self, weights, kind, left_out, code, lane_bytes, sections, end, out)
        out[sections["sign_mantissa_offset"] + 77] ^= 1
        return result

    monkeypatch.setattr(Encoder, "encode_tiles", encode_tiles)


@pytest.mark.usefixtures("wrong_encoder")
def test_what_is_encoded_is_proven_before_it_is_written(source, tmp_path):
    commands.run("convert", source, tmp_path / "x.df11").error(1, source, "'w'")
    with pytest.raises(errors.DifferenceError):
        df11.convert(source, tmp_path / "x.df11")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors"}


@pytest.mark.usefixtures("wrong_encoder")
def test_without_that_proof_the_checksums_find_it(source, tmp_path):
    commands.run("convert", source, tmp_path / "x.df11", "--no-verify").fine()
    commands.run("verify", tmp_path / "x.df11").error(1, "'w'")
    commands.run("verify", tmp_path / "x.df11", "--against", source).error(1, "'w'")
    commands.run("restore", tmp_path / "x.df11", tmp_path / "y.safetensors").error(2, "'w'")
    assert set(tree_bytes(tmp_path)) == {"x.safetensors", "x.df11"}
