"""Models on the Hub, loaded by address and by name: bit for bit, with the fewest downloads, and with helpful errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from safetensors import torch as safetensors_torch
from torch import nn

import df11
from df11 import runtime
from df11.formats import errors
from df11.runtime import hub as downloads
from df11.runtime import modules, omnigen2
from tests.support import omnigen2_stand_in as stand_in
from tests.support.hub.server import HubServer, corrupt, status, truncated
from tests.support.omnigen2 import Family

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning"),  # diffusers passes it
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]
BF16 = torch.bfloat16
JUNK = {"README.md": b"A model.", "picture.png": b"\x89PNG\0", "df11-manifest.parquet": b"PAR1\0"}
"""Other files of a repository, which nothing loads."""


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 320, bias=False), nn.LayerNorm(320)).to(BF16)


def empty() -> nn.Sequential:
    with torch.device("meta"):
        return model()


def tree(folder: Path, *, under: str = "") -> dict[str, bytes | Path | None]:
    """The files of a folder, without the manifest, which nothing loads."""
    return {
        f"{under}{path.relative_to(folder).as_posix()}": path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in JUNK
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one`: a container of all tensors of model(0); `other`: of model(1); `shards`: a folder of two and an index."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("one", 0), ("other", 1)):
        safetensors_torch.save_file(model(seed).state_dict(), folder / f"{name}.safetensors")
        df11.convert(folder / f"{name}.safetensors", folder / f"{name}.df11")
    shards, index = folder / "plain", {}
    shards.mkdir()
    for i, part in enumerate((["0.weight", "0.bias"], ["1.weight", "2.weight", "2.bias"])):
        state = model().state_dict()
        index |= dict.fromkeys(part, f"model-0000{i + 1}-of-00002.safetensors")
        safetensors_torch.save_file({name: state[name] for name in part}, shards / index[part[0]])
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    df11.convert(shards, folder / "shards")
    return {"one": folder / "one.df11", "other": folder / "other.df11", "shards": folder / "shards"}


@pytest.fixture
def switch_off(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> Iterator[Any]:
    """What HF_HUB_OFFLINE=1 does. At the end, no request may have arrived since."""
    counted: list[int] = []

    def switch() -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        counted.append(len(hub.requests))

    yield switch
    assert counted == [len(hub.requests)]


def cached(tmp_path: Path, name: str = "me/model") -> set[str]:
    """The files of a repository in the client's cache."""
    snapshots = tmp_path / "hf-home" / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    return {
        path.relative_to(commit).as_posix()
        for commit in snapshots.iterdir()
        for path in commit.rglob("*")
        if path.is_file()
    }


def fetched(hub: HubServer, since: int = 0) -> list[str]:
    """The files whose contents were requested."""
    return [
        request.path
        for request in hub.requests[since:]
        if request.method == "GET" and not request.path.startswith("/api/")
    ]


def same(found: dict[str, torch.Tensor], seed: int = 0) -> bool:
    wanted = model(seed).state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def runs_as(found: nn.Module, seed: int = 0) -> bool:
    x = torch.randn(4, 256).to(BF16)
    assert list(modules.compressed_modules(found))
    return torch.equal(found(x), model(seed)(x))


# load_file.


@pytest.mark.usefixtures("client")
def test_a_file(hub: HubServer, files: dict[str, Path], tmp_path: Path, switch_off: Any) -> None:
    repository = hub.create("me/model", private=True)
    first = repository.commit({"part/model.df11": files["other"], **JUNK})
    repository.commit({"part/model.df11": files["one"], "model.df11": files["other"]})
    assert same(runtime.load_file("hf://me/model/part/model.df11", "cpu"))
    assert cached(tmp_path) == {"part/model.df11"}
    count = len(fetched(hub))
    assert same(runtime.load_file("hf://me/model/part/model.df11", "cpu"))
    assert len(fetched(hub)) == count
    assert same(runtime.load_file(f"hf://me/model@{first}/part/model.df11", "cpu"), 1)
    assert hub.count("GET", "/api/.*/tree/") == 0
    switch_off()
    assert same(runtime.load_file("hf://me/model/part/model.df11", "cpu"))
    with pytest.raises(
        errors.RetryLaterError, match=r"hf://me/model/model\.df11: the Hub is switched off by HF_HUB_OFFLINE"
    ):
        runtime.load_file("hf://me/model/model.df11", "cpu")


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("address", ["hf://me/model", "hf://me/model/model.safetensors"])
def test_an_address_of_no_df11_file(hub: HubServer, address: str) -> None:
    with pytest.raises(
        errors.UsageError, match=r"this does not name a \.df11 file \(expected hf://me/model/model\.df11, for example\)"
    ):
        runtime.load_file(address, "cpu")
    assert not hub.requests


# load_model.


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("folder", ["", "deep/[er]/"])
def test_a_model(hub: HubServer, files: dict[str, Path], tmp_path: Path, switch_off: Any, folder: str) -> None:
    repository = hub.create("me/model")
    others = {
        "model.df11": files["other"],
        "deep/model.df11": files["other"],
        "deep/e/model.df11": files["other"],
        "deep/[er]/er/x.df11": files["other"],
    }
    repository.commit({name: path for name, path in others.items() if Path(name).parent != Path(folder)} | JUNK)  # type: ignore[arg-type]
    commit = repository.commit({**tree(files["shards"], under=folder), f"{folder}config.json": b"{}"})
    address = f"hf://me/model/{folder}".rstrip("/")
    assert runs_as(runtime.load_model(empty(), address, "cpu"))
    assert cached(tmp_path) == {name for name in tree(files["shards"], under=folder) if ".df11" in name}
    assert all(f"/resolve/{commit}/" in request.path for request in hub.requests if "/resolve/" in request.path)
    count = len(fetched(hub))
    repository.commit({f"{folder}model.df11": files["other"], f"{folder}model.df11.index.json": None})
    assert runs_as(runtime.load_model(empty(), f"{address.replace('me/model', f'me/model@{commit}')}", "cpu"))
    assert len(fetched(hub)) == count
    assert runs_as(runtime.load_model(empty(), f"hf://me/model/{folder}model.df11", "cpu"), 1)
    switch_off()
    assert runs_as(runtime.load_model(empty(), f"{address.replace('me/model', f'me/model@{commit}')}", "cpu"))


@pytest.mark.usefixtures("client")
def test_offline_without_all_files(hub: HubServer, files: dict[str, Path], switch_off: Any) -> None:
    repository = hub.create("me/model")
    repository.commit(tree(files["shards"]))
    hub.create("me/other").commit({"config.json": b"{}", "model.df11": files["one"]})
    hub.inject("GET", "00002-of-00002", status(500), times=100)
    with pytest.raises(errors.RetryLaterError, match=r"hf://me/model: the Hub has a problem \(500\)"):
        runtime.load_model(empty(), "hf://me/model", "cpu")
    huggingface_hub.hf_hub_download("me/other", "config.json")
    switch_off()
    with pytest.raises(errors.RetryLaterError, match="hf://me/model: the Hub is switched off by HF_HUB_OFFLINE"):
        runtime.load_model(empty(), "hf://me/model", "cpu")
    with pytest.raises(
        errors.RetryLaterError, match="hf://me/other: not in the cache, and the Hub could not be reached"
    ):
        runtime.load_model(empty(), "hf://me/other", "cpu")


# What goes wrong.

CASES: dict[str, tuple[str, type[errors.Df11Error], str]] = {
    "gated": ("hf://you/gated{}", errors.NotAllowedError, "access to this repository must be requested"),
    "private": ("hf://you/private{}", errors.MissingError, "private and this token cannot see it"),
    "missing": ("hf://you/nothing{}", errors.MissingError, "the repository is missing"),
    "revision": ("hf://me/model@no{}", errors.MissingError, "no such branch, tag or commit"),
    "file": ("hf://me/model/no{}", errors.MissingError, "no such file|no .df11 file here|no model_index.json here"),
    "address": ("hf://datasets/me/model{}", errors.UsageError, "datasets/ cannot own models"),
}


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("case", CASES)
def test_errors(hub: HubServer, case: str) -> None:
    for name in ("gated", "private"):
        repository = hub.create(f"you/{name}", private=name == "private", gated=name == "gated")
        repository.commit({"model.df11": b"x", "folder/model.df11": b"x", "model_index.json": b"{}"})
    hub.create("me/model").commit({"config.json": b"{}"})
    address, kind, message = CASES[case]
    calls = {
        "/model.df11": lambda path: runtime.load_file(path, "cpu"),
        "": lambda path: runtime.load_model(empty(), path, "cpu"),
        "/folder": lambda path: runtime.load_model(empty(), path, "cpu"),
        "/": lambda path: omnigen2.load_pipeline(path, "cpu"),
    }
    for rest, call in calls.items():
        with pytest.raises(kind, match=message) as caught:
            call(address.format(rest))
        assert str(caught.value).startswith(address.format(rest).rstrip("/"))
        assert "\n" not in str(caught.value)
        assert "hf_test" not in str(caught.value)


@pytest.mark.usefixtures("client")
def test_no_connection(hub: HubServer) -> None:
    while hub.servers:
        hub.servers.pop().stop()
    for call in (
        lambda path: runtime.load_file(f"{path}/x.df11", "cpu"),
        lambda path: runtime.load_model(empty(), path, "cpu"),
    ):
        with pytest.raises(errors.RetryLaterError, match=r"hf://me/model.*: no connection to the Hub"):
            call("hf://me/model")


@pytest.mark.usefixtures("client")
def test_incomplete_downloads_and_a_cache_that_is_none(hub: HubServer, files: dict[str, Path]) -> None:
    hub.create("me/model").commit({"model.df11": files["one"]})
    calls = (
        lambda: runtime.load_file("hf://me/model/model.df11", "cpu"),
        lambda: runtime.load_model(empty(), "hf://me/model", "cpu"),
    )
    for call in calls:
        hub.inject("GET", "/cdn/", truncated(10))
        with pytest.raises(
            errors.RetryLaterError,
            match=r"hf://me/model.*: the download is incomplete; run the same command again$",
        ):
            call()
    assert same(calls[0]())  # type: ignore[arg-type]
    shutil.rmtree(Path(os.environ["HF_HOME"]) / "hub")
    (Path(os.environ["HF_HOME"]) / "hub").touch()
    for call in calls:
        with pytest.raises(errors.MissingError, match=r"hf-home/hub/models--me--model: Not a directory"):
            call()


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (
        lambda: runtime.load_file("hf://me/model/model.df11", "cpu"),
        lambda: runtime.load_model(empty(), "hf://me/model", "cpu"),
        lambda: omnigen2.load_pipeline("me/model", "cpu"),
    ):
        with pytest.raises(
            errors.MissingExtraError, match=r"'huggingface_hub' is not installed; run: pip install 'df11\[hub\]'"
        ):
            call()


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("what", ["file", "model"])
def test_damage(hub: HubServer, files: dict[str, Path], what: str) -> None:
    hub.create("me/model").commit({"model.df11": files["one"]})
    for offset in (100, 40_000):  # In the header, and in a record.
        hub.inject("GET", "/cdn/", corrupt(offset))

        def load() -> Any:
            return (
                runtime.load_file("hf://me/model/model.df11", "cpu")
                if what == "file"
                else runtime.load_model(empty(), "hf://me/model", "cpu")
            )

        for _ in range(2):  # The second time it comes from the cache.
            with pytest.raises(
                (errors.FormatError, errors.SafetensorsError), match="if the download was damaged, delete "
            ) as caught:
                load()
        assert caught.value.hint
        Path(caught.value.hint.split("delete ")[1].split(" and load")[0]).unlink()
        assert same(load()) if what == "file" else runs_as(load())
        shutil.rmtree(os.environ["HF_HOME"])
    damaged = bytearray(files["one"].read_bytes())
    damaged[40_000] ^= 1
    local = Path(os.environ["HF_HOME"]).parent / "damaged.df11"
    local.write_bytes(damaged)
    with pytest.raises(errors.ChecksumError) as caught:
        runtime.load_file(local, "cpu")
    assert caught.value.hint is None


UNTOUCHED = """
import os, sys, df11.runtime
from df11.runtime import load_file, load_model, omnigen2
assert "huggingface_hub" not in sys.modules
import huggingface_hub
from huggingface_hub.utils import _http
before = dict(os.environ), _http._GLOBAL_CLIENT_FACTORY
for _ in range(2):
    assert len(load_file("hf://me/model/model.df11", "cpu")) == 5
assert (dict(os.environ), _http._GLOBAL_CLIENT_FACTORY) == before
"""


def test_the_program_around_it_is_left_alone(hub: HubServer, files: dict[str, Path], tmp_path: Path) -> None:
    hub.create("me/model").commit({"model.df11": files["one"]})
    environment = hub.environment(tmp_path / "home")
    del environment["HF_HUB_DISABLE_XET"]
    assert python(UNTOUCHED, environment).returncode == 0
    count = len(hub.requests)
    assert python(UNTOUCHED, environment | {"HF_HUB_OFFLINE": "1"}).returncode == 0
    assert len(hub.requests) == count > 0


def python(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_which_paths_are_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "here").mkdir(parents=True)
    assert str(downloads.address_of("me/there")) == "hf://me/there"
    assert str(downloads.address_of("hf://me/here@x/y")) == "hf://me/here@x/y"
    for path in ("me/here", "me", "a/b/c", "models/there", "./there", "../there", "/me", "me/", Path("me/there"), None):
        assert downloads.address_of(path) is None


# OmniGen2.


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small OmniGen2 and its df11 folder."""
    return Family("stand-in", tmp_path_factory.mktemp("omnigen2"))


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("df11.runtime.model.SMALL", 1 << 12)


def first_weights(pipeline: Any) -> bytes:
    return bytes(pipeline.transformer.state_dict()["layers.0.attn.to_q.weight"].record.numpy())


def of_components(family: Any, *names: str) -> set[str]:
    return {name for name in tree(family.df11) if name.partition("/")[0] in names}


@pytest.mark.usefixtures("client", "small_weights")
def test_an_omnigen2_pipeline(
    hub: HubServer, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch_off: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    repository = hub.create("me/omni", private=True)
    junk = {
        "README.md",
        "assets/one.png",
        "vae/picture.png",
        "vae/df11-manifest.parquet",
        "mllm/pytorch_model.bin",
        "other/model.df11",
    }
    template = {"processor/additional_chat_templates/short.jinja": b"{{ messages }}"}
    commit = repository.commit({**tree(family.df11), **template, **JUNK, **dict.fromkeys(junk, b"\0")})
    options = {"classes": family.classes}
    expected = first_weights(omnigen2.load_pipeline(family.df11, "cpu", **options))
    assert first_weights(omnigen2.load_pipeline("me/omni", "cpu", **options)) == expected
    assert cached(tmp_path, "me/omni") == {*tree(family.df11), *template}
    assert all(f"/resolve/{commit}/" in request.path for request in hub.requests if "/resolve/" in request.path)
    count = len(fetched(hub))
    repository.commit({"vae/config.json": b"{"})
    assert first_weights(omnigen2.load_pipeline(f"hf://me/omni@{commit}", "cpu", **options)) == expected
    assert len(fetched(hub)) == count
    switch_off()
    assert first_weights(omnigen2.load_pipeline(f"hf://me/omni@{commit}", "cpu", **options)) == expected
    shutil.copytree(family.df11, tmp_path / "me" / "omni")  # A folder with this name comes first.
    assert first_weights(omnigen2.load_pipeline("me/omni", "cpu", **options)) == expected


@pytest.mark.usefixtures("client", "small_weights")
def test_components_of_ones_own(hub: HubServer, family: Any, tmp_path: Path) -> None:
    hub.create("me/omni").commit(tree(family.df11, under="part/"))
    hub.create("me/transformer").commit({**tree(family.df11 / "transformer"), **JUNK, "vae/model.df11": b"x"})
    ready = omnigen2.load_pipeline(family.df11, "cpu", classes=family.classes)
    components = {"vae": ready.vae, "mllm": ready.mllm, "transformer": "hf://me/transformer"}
    pipeline = omnigen2.load_pipeline("hf://me/omni/part", "cpu", classes=family.classes, **components)
    assert pipeline.vae is ready.vae
    assert first_weights(pipeline) == first_weights(ready)
    assert cached(tmp_path, "me/omni") == {"part/model_index.json"} | {
        f"part/{name}" for name in of_components(family, "scheduler", "processor")
    }
    assert cached(tmp_path, "me/transformer") == set(tree(family.df11 / "transformer"))


@pytest.mark.usefixtures("client")
def test_pipelines_that_cannot_be_loaded(
    hub: HubServer, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.create("me/omni").commit(tree(family.df11))
    hub.create("me/plain").commit(tree(family.plain))
    with pytest.raises(errors.MissingExtraError, match="is not installed"):
        omnigen2.load_pipeline(
            "me/omni", "cpu", classes=nn
        )  # Which has none of the classes: found out before anything large is downloaded.
    hint = r"hf://me/plain@[0-9a-f]{40}/mllm: no \.df11 file here; df11-convert --cast bf16 hf://me/plain plain-df11"
    with pytest.raises(errors.MissingError, match=hint):
        omnigen2.load_pipeline("me/plain", "cpu", classes=family.classes)
    assert hub.count("GET", "/cdn/") == 0
    with pytest.raises(
        errors.MissingError,
        match=r"hf://me/nothing: the repository is missing.*; there is no folder with this name either",
    ):
        omnigen2.load_pipeline("me/nothing", "cpu", classes=family.classes)


@pytest.mark.usefixtures("client", "small_weights")
def test_a_script_of_omnigen2(hub: HubServer, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = json.loads((family.df11 / "model_index.json").read_text())
    index["processor"][0] = "tests.support.omnigen2_stand_in"
    files = {
        **tree(family.df11),
        **JUNK,
        "model_index.json": json.dumps(index).encode(),
        "transformer/transformer_omnigen2.py": b"raise SystemExit",
    }
    commit = hub.create("me/omni").commit(files)
    hub.create("me/plain").commit(tree(family.plain))
    expected = first_weights(omnigen2.load_pipeline(family.df11, "cpu", classes=family.classes))
    with omnigen2.loading_df11():
        for path, options in (("me/omni", {"revision": commit}), ("hf://me/omni", {})):
            pipeline = stand_in.OmniGen2Pipeline.from_pretrained(
                path, torch_dtype=BF16, trust_remote_code=True, **options
            )
            assert first_weights(pipeline) == expected
            load = stand_in.OmniGen2Transformer2DModel.from_pretrained
            assert load(path, subfolder="transformer", torch_dtype=BF16, **options) is pipeline.transformer
        assert cached(tmp_path, "me/omni") == set(files) - set(JUNK)
        count = len(hub.requests)
        vae = diffusers.AutoencoderKL.from_pretrained("me/plain", subfolder="vae", torch_dtype=BF16)
        assert not list(modules.compressed_modules(vae))
        assert not [path for path in fetched(hub, count) if "me/plain" not in path]
        with pytest.raises(OSError, match="me/nothing"):
            stand_in.OmniGen2Transformer2DModel.from_pretrained("me/nothing", torch_dtype=BF16)
        with pytest.raises(errors.MissingError, match=r"no \.df11 file here"):
            stand_in.OmniGen2Transformer2DModel.from_pretrained("hf://me/plain/transformer", torch_dtype=BF16)


# from_pretrained of transformers and diffusers, with the name of a repository.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `many`: a language model as transformers writes it, in one file and in shards.

    `one-df11`, `many-df11`: the same, converted.
    """
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    ).to(BF16)
    folder = tmp_path_factory.mktemp("llama")
    for name, options in (("one", {}), ("many", {"max_shard_size": "500KB"})):
        made.save_pretrained(folder / name, **options)
        df11.convert(folder / name, folder / f"{name}-df11")
    return folder


def language_model(path: str | Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **{"dtype": BF16} | options)


@torch.no_grad()
def logits(found: Any) -> torch.Tensor:
    return found(torch.tensor([[5, 6, 7]])).logits  # type: ignore[no-any-return]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("name", ["one", "many"])
def test_transformers(hub: HubServer, llama: Path, tmp_path: Path, name: str, switch_off: Any) -> None:
    expected = logits(language_model(llama / name))
    repository = hub.create("me/model", private=True)
    commit = repository.commit({**tree(llama / f"{name}-df11"), **JUNK})
    repository.commit({"config.json": b"{", "model.df11": b"damaged"})
    found = language_model("me/model", revision=commit)
    assert list(modules.compressed_modules(found))
    assert torch.equal(logits(found), expected)
    assert cached(tmp_path) == set(tree(llama / f"{name}-df11"))
    count = len(fetched(hub))
    assert torch.equal(logits(language_model("me/model", revision=commit, use_safetensors=True)), expected)
    assert len(fetched(hub)) == count
    assert (
        hub.count("GET", "/discussions") == 0
    )  # where transformers looks before it asks a bot to convert the repository
    repository.tags["v1"] = commit
    options = {"cache_dir": tmp_path / "cache", "token": "hf_test", "revision": "v1"}
    assert torch.equal(logits(language_model("me/model", **options)), expected)
    assert len(fetched(hub)) > count
    assert torch.equal(logits(language_model("me/model", **options, force_download=True)), expected)
    count = len(hub.requests)
    assert torch.equal(logits(language_model("me/model", **options, local_files_only=True)), expected)
    assert len(hub.requests) == count
    switch_off()
    assert torch.equal(logits(language_model("me/model", revision=commit)), expected)


@pytest.mark.usefixtures("client")
def test_transformers_and_damage(hub: HubServer, llama: Path) -> None:
    hub.create("me/model").commit(tree(llama / "one-df11", under="part/"))
    hub.inject("GET", "/cdn/", corrupt(100_000))
    with pytest.raises(errors.ChecksumError, match="if the download was damaged, delete ") as caught:
        language_model("me/model", subfolder="part")
    Path(str(caught.value.hint).split("delete ")[1].split(" and load")[0]).unlink()
    assert torch.equal(logits(language_model("me/model", subfolder="part")), logits(language_model(llama / "one")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`: a pipeline as diffusers writes it. The transformer is in shards; the rest also comes as a variant x.

    `df11`: the same, converted.
    """
    torch.manual_seed(0)
    sizes = {
        "num_layers": 1,
        "num_single_layers": 0,
        "attention_head_dim": 32,
        "num_attention_heads": 8,
        "axes_dims_rope": (8, 12, 12),
    }
    transformer = diffusers.FluxTransformer2DModel(
        **sizes, in_channels=16, joint_attention_dim=256, pooled_projection_dim=256
    )
    text = {
        "vocab_size": 300,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "hidden_size": 256,
        "intermediate_size": 512,
    }
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, max_position_embeddings=32))
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=300, d_model=256, d_kv=64, d_ff=512, num_layers=1, num_heads=4)
    )
    pipeline = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), None, clip.to(BF16), None, t5.to(BF16), None, transformer.to(BF16)
    )
    folder = tmp_path_factory.mktemp("flux")
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "plain", variant="x")
    (folder / "plain" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(folder / "plain" / "transformer", max_shard_size="1MB")
    df11.convert(folder / "plain", folder / "df11")
    return folder


PARTS = ("transformer", "text_encoder", "text_encoder_2")


def load_flux(path: str | Path, **options: Any) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(
        path, **{"dtype": BF16, "vae": None, "tokenizer": None, "tokenizer_2": None} | options
    )


def equal_parts(found: Any, expected: Any, parts: tuple[str, ...] = PARTS) -> bool:
    for name in parts:
        assert list(modules.compressed_modules(getattr(found, name))), name
    states = [
        {f"{name}.{key}": value for name in parts for key, value in values(getattr(one, name)).items()}
        for one in (found, expected)
    ]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[1]
    )


def values(part: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.data + 0
        for name, module in part.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    }


def weights_in(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith((".df11", ".bin", ".safetensors"))}


@pytest.mark.usefixtures("client")
def test_a_diffusers_pipeline(hub: HubServer, flux: Path, tmp_path: Path, switch_off: Any) -> None:
    expected = load_flux(flux / "plain")
    repository = hub.create("me/model", private=True)
    commit = repository.commit({**tree(flux / "df11"), **JUNK, "assets/picture.png": b"\0"})
    repository.commit({"transformer/config.json": b"{"})
    found = load_flux("me/model", revision=commit, transformer=expected.transformer)
    assert equal_parts(found, expected, PARTS[1:])
    assert not any(name.startswith("transformer/") for name in cached(tmp_path))
    assert equal_parts(load_flux("me/model", revision=commit), expected)
    assert cached(tmp_path) == {name for name in tree(flux / "df11") if ".x." not in name}
    count = len(fetched(hub))
    assert equal_parts(load_flux("me/model", revision=commit, use_safetensors=True), expected)
    assert len(fetched(hub)) == count
    repository.tags["v1"] = commit
    options = {"cache_dir": tmp_path / "cache", "token": "hf_test", "revision": "v1"}
    assert equal_parts(load_flux("me/model", **options, force_download=True), expected)
    count = len(hub.requests)
    assert equal_parts(load_flux("me/model", **options, local_files_only=True), expected)
    assert len(hub.requests) == count
    switch_off()
    assert equal_parts(load_flux("me/model", revision=commit), expected)


@pytest.mark.usefixtures("client")
def test_a_variant_of_a_diffusers_pipeline(hub: HubServer, flux: Path, tmp_path: Path) -> None:
    hub.create("me/model").commit(tree(flux / "df11"))
    assert equal_parts(load_flux("me/model", variant="x"), load_flux(flux / "plain"))
    assert weights_in(cached(tmp_path)) == {name for name in weights_in(set(tree(flux / "df11"))) if ".x" in name}


@pytest.mark.usefixtures("client")
def test_a_diffusers_pipeline_with_other_weights_besides(hub: HubServer, flux: Path, tmp_path: Path) -> None:
    expected = load_flux(flux / "plain")
    torch.save(expected.text_encoder_2.state_dict(), tmp_path / "pytorch_model.bin")
    files = {
        name: path
        for name, path in tree(flux / "df11").items()
        if not name.startswith("text_encoder_2/model") and ".x." not in name
    }
    hub.create("me/model").commit({**files, "text_encoder_2/pytorch_model.bin": tmp_path / "pytorch_model.bin"})
    assert equal_parts(load_flux("me/model"), expected, PARTS[:2])
    hub.create("me/both").commit(
        {**tree(flux / "plain"), **tree(flux / "df11")}
    )  # Then diffusers takes what it always took.
    assert not list(modules.compressed_modules(load_flux("me/both").transformer))
    assert not [name for name in cached(tmp_path, "me/both") if ".df11" in name]


@pytest.mark.usefixtures("client")
def test_a_diffusers_model(hub: HubServer, flux: Path, tmp_path: Path, switch_off: Any) -> None:
    expected = load_flux(flux / "plain")
    commit = hub.create("me/model").commit({**tree(flux / "df11"), **JUNK})
    for variant in (None, "x"):
        options = {"subfolder": "transformer", "revision": commit, "variant": variant, "dtype": BF16}
        expected.loaded = diffusers.FluxTransformer2DModel.from_pretrained("me/model", **options)
        assert torch.equal(
            *(
                torch.cat([value.flatten() for value in values(one).values()])
                for one in (expected.loaded, expected.transformer)
            )
        )
        assert list(modules.compressed_modules(expected.loaded))
    assert cached(tmp_path) == {name for name in tree(flux / "df11") if name.startswith("transformer/")}
    count = len(fetched(hub))
    diffusers.FluxTransformer2DModel.from_pretrained("me/model", subfolder="transformer", revision=commit, dtype=BF16)
    assert len(fetched(hub)) == count
    switch_off()
    diffusers.FluxTransformer2DModel.from_pretrained("me/model", **options)


@pytest.mark.usefixtures("client")
def test_diffusers_and_damage(hub: HubServer, flux: Path) -> None:
    hub.create("me/model").commit(tree(flux / "df11"))
    for variant in (None, "x"):  # In shards, and in one file.
        hub.inject("GET", "/cdn/.*diffusion_pytorch_model", corrupt(100_000))
        with pytest.raises(errors.ChecksumError, match="if the download was damaged, delete "):
            diffusers.FluxTransformer2DModel.from_pretrained(
                "me/model", subfolder="transformer", variant=variant, dtype=BF16
            )


OTHERS = """
import sys
if sys.argv[1] == "df11":
    import df11.runtime
import torch, transformers, diffusers
options = {"dtype": torch.bfloat16}
transformers.AutoModelForCausalLM.from_pretrained("me/one", **options)
transformers.AutoModelForCausalLM.from_pretrained("me/many", **options)
print("pipeline")
diffusers.DiffusionPipeline.from_pretrained("me/plain", vae=None, tokenizer=None, tokenizer_2=None, **options)
diffusers.FluxTransformer2DModel.from_pretrained("me/plain", subfolder="transformer", **options)
diffusers.FluxTransformer2DModel.from_pretrained("me/single", subfolder="transformer", variant="x", **options)
for name in ("me/nothing", "me/one"):
    try:
        diffusers.AutoencoderKL.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        print(type(error))
    else:
        raise AssertionError
"""


def test_other_models_are_left_alone(hub: HubServer, llama: Path, flux: Path, tmp_path: Path) -> None:
    for name, folder in (
        ("one", llama / "one"),
        ("many", llama / "many"),
        ("plain", flux / "plain"),
        ("single", flux / "plain"),
    ):
        hub.create(f"me/{name}").commit(tree(folder))
    seen = []
    for how in ("plain", "df11"):
        done = subprocess.run(
            [sys.executable, "-c", OTHERS, how],
            capture_output=True,
            text=True,
            check=False,
            env=hub.environment(tmp_path / how),
        )
        assert done.returncode == 0, done.stderr
        requests = [f"{request.method} {request.path.partition('?')[0]}" for request in hub.requests]
        hub.requests.clear()
        seen.append((done.stdout, sorted(request for request in requests if "df11" not in request)))
        extra = [request for request in requests if "df11" in request]
        assert all(request.startswith("HEAD") for request in extra)
        assert len(extra) == (
            0 if how == "plain" else 3
        )  # For an index, once a model, and for the file of the model that is none.
    assert seen[0] == seen[1]
    assert hub.count(".*", ".*") == 0
