"""Model folders as users have them: incomplete, stale, changed, with adapters and other programs' files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import df11
from df11.converter import parquet
from df11.formats import errors
from tests.support import commands, sources
from tests.support.sources import bf16, random_tensor, tree_bytes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4988025760\n"


def shard(name: str, seed: int = 0) -> bytes:
    return sources.file_bytes([bf16(name, (100, 64), seed)])


def index_of(*names: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


@pytest.fixture
def model(tmp_path) -> Path:
    """Two shards, an index, a configuration."""
    return put(
        tmp_path / "model",
        {
            "model-00001-of-00002.safetensors": shard("t0"),
            "model-00002-of-00002.safetensors": shard("t1", 1),
            "model.safetensors.index.json": index_of(
                "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
            ),
            "config.json": b"{}",
        },
    )


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(folder: Path) -> set[str]:
    return set(tree_bytes(folder)) - {"df11-manifest.parquet"}


# Incomplete sources


@pytest.mark.parametrize("command", ["convert", "restore", "verify"])
def test_a_shard_that_the_index_names_must_be_there(command, model, tmp_path):
    if command != "convert":
        df11.convert(model, tmp_path / "df11")
        model = tmp_path / "df11"
    gone = next(path for path in sorted(model.iterdir()) if "00002-of" in path.name)
    gone.unlink()
    arguments = [model] if command == "verify" else [model, tmp_path / "out"]
    line = commands.run(command, *arguments).error(4, gone, "index.json")
    assert not (tmp_path / "out").exists()
    assert ("--allow-missing" in line) == (command != "verify")
    if command != "verify":
        result = commands.run(command, *arguments, "--allow-missing").fine()
        assert gone.name in result.err
        assert len([name for name in names(tmp_path / "out") if "of-00002" in name]) == 1


def test_shards_that_no_index_names_are_told(model, tmp_path):
    put(model, {"model-00003-of-00003.safetensors": shard("old")})
    result = commands.run("convert", model, tmp_path / "out").fine()
    (line,) = [line for line in result.err.splitlines() if "00003" in line]
    assert "index" in line
    assert "model-00003-of-00003.df11" in names(tmp_path / "out")


def test_a_download_that_has_not_ended_is_told(model, tmp_path):
    put(model, {"model-00002-of-00002.safetensors.aria2": b"state", "tokenizer.json.incomplete": b"{"})
    result = commands.run("convert", model, tmp_path / "out").fine()
    assert result.err.count("an unfinished download") == 2
    assert not [name for name in names(tmp_path / "out") if "aria2" in name or "incomplete" in name]


# Stale targets


def test_containers_of_an_earlier_run_go_with_their_shards(model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    put(out, {"mine.df11": (out / "model-00001-of-00002.df11").read_bytes()})
    for path in model.glob("model*"):
        path.unlink()
    put(model, {"model.safetensors": shard("t0")})
    df11.convert(model, out)
    # Their index goes, too. What the manifest does not name belongs to somebody.
    assert names(out) == {"model.df11", "config.json", "mine.df11"}
    df11.verify(out)
    assert [row.file for row in parquet.read(out).files] == ["model.df11"]


def test_without_a_manifest_nothing_is_removed(model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    before = names(out)
    (out / "df11-manifest.parquet").unlink()
    for path in model.glob("model*"):
        path.unlink()
    put(model, {"model.safetensors": shard("t0")})
    df11.convert(model, out)
    assert names(out) == before | {"model.df11"}


def test_what_this_run_leaves_out_stays_and_keeps_its_rows(model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    rows = parquet.read(out)
    before = tree_bytes(out)
    df11.convert(model, out, include=["*00001*"])
    assert tree_bytes(out) == before
    assert parquet.read(out) == rows


# Updates


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_an_update_costs_what_has_changed(options, model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    kept = {path: path.stat().st_ino for path in out.glob("*.df11")}
    put(model, {"config.json": b'{"new": 1}', "tokenizer.json": b"{}"})
    report = commands.run("convert", model, out, "--json", *options).fine().events
    assert [event["status"] for event in report if event["event"] == "file"] == ["skipped", "skipped"]
    assert {path: path.stat().st_ino for path in out.glob("*.df11")} == kept
    assert (out / "config.json").read_bytes() == b'{"new": 1}'
    assert (out / "tokenizer.json").read_bytes() == b"{}"
    put(model, {"model-00002-of-00002.safetensors": shard("t1", 7)})
    report = commands.run("convert", model, out, "--json", *options).fine().events
    assert [event["status"] for event in report if event["event"] == "file"] == ["skipped", "converted"]
    df11.verify(out, model)


def test_what_somebody_has_edited_is_replaced_by_force_only(model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    put(model, {"config.json": b'{"new": 1}', "model-00002-of-00002.safetensors": shard("t1", 7)})
    put(out, {"config.json": b'{"mine": 1}'})
    before = tree_bytes(out)
    commands.run("convert", model, out).error(2, out / "config.json", "--force")
    assert tree_bytes(out) == before  # Found before the first shard is converted.
    commands.run("convert", model, out, "--force").fine()
    assert (out / "config.json").read_bytes() == b'{"new": 1}'


def test_a_file_that_is_no_container_is_somebodys(model, tmp_path):
    out = tmp_path / "out"
    df11.convert(model, out)
    put(out, {"model-00001-of-00002.df11": b"mine"})
    commands.run("convert", model, out).error(2, "model-00001-of-00002.df11", "--force")
    assert (out / "model-00001-of-00002.df11").read_bytes() == b"mine"


# What belongs to a model folder


LEFT_OUT = [
    "._model-00001-of-00002.safetensors",
    "__MACOSX/._x.safetensors",
    ".git/config",
    ".cache/huggingface/download/x.metadata",
    ".huggingface/x.safetensors",
    ".DS_Store",
    "sub/Thumbs.db",
    "desktop.ini",
    "config.json~",
    ".config.json.swp",
    ".nfs000000000001",
    ".ipynb_checkpoints/x.json",
    "__pycache__/modeling.cpython-311.pyc",
]


def test_other_programs_files_are_left_out(model, tmp_path):
    wanted = set(tree_bytes(model))
    put(model, {name: b"\0\5\26\7" + bytes(100) for name in LEFT_OUT} | {".hidden": b"the model's own"})
    df11.convert(model, tmp_path / "out")
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert set(tree_bytes(tmp_path / "back")) == wanted | {".hidden"}


def test_a_folder_of_the_hubs_cache_is_its_snapshot(model, tmp_path):
    root = tmp_path / "models--you--m"
    first, second = "1" * 40, "2" * 40
    shutil.copytree(model, root / "snapshots" / first)
    (root / "blobs").mkdir()
    df11.convert(root, tmp_path / "out")
    assert "config.json" in names(tmp_path / "out")
    shutil.copytree(model, root / "snapshots" / second)
    put(root / "snapshots" / second, {"config.json": b'{"second": 1}'})
    commands.run("convert", root, tmp_path / "never").error(2, "2 snapshots", root / "snapshots")
    put(root, {"refs/main": second.encode()})
    df11.convert(root, tmp_path / "main")
    assert (tmp_path / "main" / "config.json").read_bytes() == b'{"second": 1}'


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.model", "config.json"])
def test_a_git_lfs_pointer_is_no_file(name, model, tmp_path):
    put(model, {name: POINTER})
    commands.run("convert", model, tmp_path / "out").error(2, name, "Git LFS", "git lfs pull")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "verify", "restore", "inspect"])
def test_a_git_lfs_pointer_alone(command, tmp_path):
    put(tmp_path, {"x.safetensors": POINTER, "x.df11": POINTER})
    path = tmp_path / ("x.safetensors" if command == "convert" else "x.df11")
    target = [tmp_path / "out"] if command in ("convert", "restore") else []
    result = commands.run(command, path, *target)
    assert result.code in (1, 2)
    assert "Git LFS" in result.err
    assert "git lfs pull" in result.err
    with pytest.raises(errors.SafetensorsError, match="Git LFS"):
        df11.open(tmp_path / "x.df11")


def test_sft_is_safetensors(tmp_path):
    model = put(tmp_path / "model", {"vae/ae.sft": shard("a"), "x.safetensors": shard("b")})
    df11.convert(model, tmp_path / "out")
    assert names(tmp_path / "out") == {"vae/ae.df11", "x.df11"}
    df11.verify(tmp_path / "out", model)
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(model)
    df11.convert(model / "vae" / "ae.sft", tmp_path / "one.df11")
    both = put(tmp_path / "both", {"x.sft": shard("a"), "x.safetensors": shard("b")})
    commands.run("convert", both, tmp_path / "never").error(2, "x.sft", "x.safetensors", "x.df11")


ADAPTERS = [
    "adapter/adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "lora/pytorch_lora_weights.fp16.safetensors",
    "learned_embeds.safetensors",
    "sdxl_models/ip-adapter_sdxl.safetensors",
]


def test_adapters_stay_as_they_are(model, tmp_path):
    put(model, {name: shard("lora_A", 3) for name in ADAPTERS})
    df11.convert(model, tmp_path / "out")
    for name in ADAPTERS:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(model)
    # An adapter named explicitly is meant.
    df11.convert(model / ADAPTERS[0], tmp_path / "adapter.df11")


def test_another_copy_of_the_model_is_told(model, tmp_path):
    put(model, {"consolidated.safetensors": shard("c"), "pytorch_model.bin": b"pickle", "sub/other.bin": b"x"})
    line = commands.run("convert", model, tmp_path / "out").fine().err
    assert "consolidated.safetensors and 1 more" in line
    assert "--exclude" in line
    err = commands.run("convert", model, tmp_path / "x", "--exclude", "consolidated*", "--exclude", "*.bin").fine().err
    assert "consolidated" not in err
    assert not {"consolidated.df11", "pytorch_model.bin", "sub/other.bin"} & names(tmp_path / "x")


def test_a_folder_that_is_there_twice_is_told(model, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(model, root / "checkpoint-100")
    (root / "latest").symlink_to("checkpoint-100")
    line = commands.run("convert", root, tmp_path / "out").fine().err
    assert "latest" in line
    assert "checkpoint-100" in line
    commands.run("convert", root, tmp_path / "x", "--exclude", "latest/").fine()
    assert {name.partition("/")[0] for name in names(tmp_path / "x")} == {"checkpoint-100"}


@pytest.mark.parametrize("text", [b"*.safetensors filter=lfs\n", b"no end of line", b""])
def test_gitattributes_cover_containers(text, model, tmp_path):
    put(model, {".gitattributes": text})
    df11.convert(model, tmp_path / "out")
    assert b"*.df11 filter=lfs diff=lfs merge=lfs -text\n" in (tmp_path / "out" / ".gitattributes").read_bytes()
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert tree_bytes(tmp_path / "back") == tree_bytes(model)
    # The target repository's own file stays.
    put(tmp_path / "clone", {".gitattributes": b"own"})
    df11.convert(model, tmp_path / "clone")
    assert (tmp_path / "clone" / ".gitattributes").read_bytes() == b"own"


def test_include_and_exclude(model, tmp_path):
    put(model, {"text/a.safetensors": shard("a"), "text/b.json": b"{}", "notes.md": b""})
    for options, wanted in [
        (["--include", "text/*"], {"text/a.df11", "text/b.json"}),
        (["--include", "text/"], {"text/a.df11", "text/b.json"}),
        (["--include", "*.safetensors", "--exclude", "text/*"], {f"model-0000{n}-of-00002.df11" for n in (1, 2)}),
        (["--exclude", "*.md", "--exclude", "model*"], {"config.json", "text/a.df11", "text/b.json"}),
    ]:
        target = tmp_path / "-".join(options).replace("/", "_").replace("*", "_")
        commands.run("convert", model, target, *options).fine()
        assert names(target) == wanted
    commands.run("convert", model, tmp_path / "never", "--include", "nothing*").error(2, "no .safetensors", "include")


# Silence


def test_a_run_that_compresses_nothing_says_why(tmp_path):
    half = put(
        tmp_path / "half",
        {
            "x.safetensors": sources.file_bytes(
                [random_tensor("a", "F16", (64,)), random_tensor("b", "F32", (64,)), random_tensor("c", "F16", (8,))]
            )
        },
    )
    for source, target in ((half, "out"), (half / "x.safetensors", "x.df11")):
        (line,) = [
            line
            for line in commands.run("convert", source, tmp_path / target).fine().err.splitlines()
            if "nothing was compressed" in line
        ]
        assert "2 in F16" in line
        assert "--cast bf16" in line
    adapter = put(tmp_path / "adapter", {"adapter_model.safetensors": shard("a")})
    assert "adapters" in commands.run("convert", adapter, tmp_path / "a").fine().err
    assert not commands.run("convert", half, tmp_path / "quiet", "--quiet").fine().err


def test_a_run_that_compresses_something_says_nothing(model, tmp_path):
    assert "warning" not in commands.run("convert", model, tmp_path / "out").fine().err


# Whatever can be known is known before the first byte is written.


def test_a_disk_that_is_too_small_is_known_before(model, tmp_path, monkeypatch):
    monkeypatch.setattr("df11.storage.local.LocalStore.free_bytes", lambda _: 1000)
    commands.run("convert", model, tmp_path / "out").error(6, "disk space", "1,000")
    assert not (tmp_path / "out").exists()


def test_a_memory_that_is_too_small_for_the_last_shard_is_known_before(model, tmp_path):
    put(model, {"z.safetensors": sources.file_bytes([bf16("w", (sources.SEGMENT,))])})
    result = commands.run("convert", model, tmp_path / "out", "--max-memory", "95MiB")
    assert result.code == 6
    assert "z.safetensors: --max-memory" in result.err
    assert not (tmp_path / "out").exists()


def test_a_copy_is_not_more_open_than_its_source(model, tmp_path):
    for path in model.iterdir():
        path.chmod(0o600)
    df11.convert(model, tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert {name: mode for name, mode in modes.items() if name != "df11-manifest.parquet"} == dict.fromkeys(
        [name for name in modes if name != "df11-manifest.parquet"], 0o600
    )
    df11.restore(tmp_path / "out", tmp_path / "back")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "back").iterdir()} == {0o600}
