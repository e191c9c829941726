"""Job files: what they mean, and that each mistake in them is one clear line before anything is done."""

from pathlib import Path

import pytest

from df11.formats import errors
from df11.pipelines.card import CardFields
from df11.pipelines.job import DEFAULT_MEMORY, read_job

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci" / "job.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_example_is_a_job() -> None:
    job = read_job(EXAMPLE)
    assert [model.source for model in job.models] == ["hf://Qwen/Qwen3-0.6B@main", "hf://OmniGen2/OmniGen2"]
    assert [model.cast for model in job.models] == [None, "bf16"]
    assert job.models[0].card.tags == ("example",)
    assert job.models[1].exclude == ("assets/*", "*.jpg")
    assert (job.limits.memory, job.limits.disk, job.limits.threads) == (300 << 20, 15_000_000_000, None)
    assert job.shards_per_commit == 1


def test_little_is_needed(tmp_path: Path) -> None:
    job = read_job(write(tmp_path, '[[model]]\nsource = "model"\ntarget = "hf://me/model-df11"\n'))
    (model,) = job.models
    assert (model.source, model.target) == (str(tmp_path / "model"), "hf://me/model-df11")
    assert (model.cast, model.private, model.exclude, model.card) == (None, None, (), CardFields())
    assert (model.include, model.allow_missing) == ((), False)
    assert DEFAULT_MEMORY == "300MiB"
    assert (job.limits.memory, job.limits.disk) == (300 << 20, None)


def test_paths_start_from_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/fast")
    text = '[[model]]\nsource = "a"\ntarget = "/b"\n[model.card]\nresults = "r.json"\n[limits]\nwork = "$SCRATCH/x"\n'
    job = read_job(write(tmp_path, text))
    assert (job.models[0].source, job.models[0].target) == (str(tmp_path / "a"), "/b")
    assert job.models[0].card.results == str(tmp_path / "r.json")
    assert job.limits.work == Path("/fast/x")


def test_a_revision_goes_into_the_address(tmp_path: Path) -> None:
    job = read_job(write(tmp_path, '[[model]]\nsource = "hf://a/b/sub"\nrevision = "refs/pr/3"\ntarget = "t"\n'))
    assert job.models[0].source == "hf://a/b@refs/pr/3/sub"


MODEL = '[[model]]\nsource = "hf://a/b"\ntarget = "hf://me/b"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no 'model'"]),
        (".".join(["a"] * 16) + ".b = 1", ["a key of too many parts", "16"]),
        ("[x.'y z'" + ' . "z z"' * 20 + "]", ["a key of too many parts"]),
        ("x = {a = [{" + "a-b." * 5000 + "c = 1}]}", ["a key of too many parts"]),
        (f"{MODEL}exclude = ['{'*a' * 501}']", ["exclude", "up to 1000 characters"]),
        ("model = []", ["no [[model]]"]),
        ("model = 1", ["a list", "1"]),
        ("model = [1]", ["[[model]] 1", "a table"]),
        ("[[model]", ["not a TOML file"]),
        ('[[model]]\nsource = "hf://a/b"\n', ["[[model]] 1", "'target'"]),
        ('[[model]]\ntarget = "hf://a/b"\n', ["[[model]] 1", "'source'"]),
        ('[[model]]\nsource = 3\ntarget = "x"\n', ["source", "a string", "3"]),
        ('[[model]]\nsource = "hf://a"\ntarget = "x"\n', ["hf://a", "hf://owner/name"]),
        ('[[model]]\nsource = "hf://a/b"\ntarget = "hf://me/b/sub"\n', ["target", "without a folder"]),
        ('[[model]]\nsource = "hf://a/b"\ntarget = "hf://A/B@other"\n', ["same repository"]),
        ('[[model]]\nsource = "a"\nrevision = "main"\ntarget = "b"\n', ["revision", "on the Hub"]),
        ('[[model]]\nsource = "hf://a/b@x"\nrevision = "main"\ntarget = "b"\n', ["revision", "without @revision"]),
        ('[[model]]\nsource = "a"\ntarget = "b"\nprivate = true\n', ["private", "on the Hub"]),
        (MODEL + "private = 1\n", ["private", "true or false"]),
        (MODEL + 'cast = "fp8"\n', ["cast", "'bf16'", "fp8"]),
        (MODEL + 'exclude = "*.bin"\n', ["exclude", "a list"]),
        (MODEL + "exclude = [1]\n", ["exclude", "a list of strings"]),
        (MODEL + 'sorce = "x"\n', ["unknown keys", "sorce", "source"]),
        (MODEL + '[model.card]\nlicence = "mit"\n', ["[model.card] 1", "licence", "license"]),
        (MODEL + "[model.card]\nlicense = 1\n", ["license", "a string"]),
        (MODEL + '[limits]\nmemory = "lots"\n', ["memory", "300MiB", "lots"]),
        (MODEL + "[limits]\nmemory = 300\n", ["memory", "a string", "300"]),
        (MODEL + "[limits]\nthreads = 0\n", ["threads", "at least 1"]),
        (MODEL + "[limits]\nthreads = true\n", ["threads", "a whole number"]),
        (MODEL + '[limits]\nmem = "1GB"\n', ["[limits]", "unknown keys", "mem", "memory"]),
        (MODEL + "[upload]\nshards_per_commit = 0\n", ["shards_per_commit", "at least 1"]),
        (MODEL + "[uploads]\n", ["unknown keys", "uploads", "[upload]"]),
        (MODEL + MODEL, ["1 and 2", "same target"]),
        (MODEL + '[[model]]\nsource = "hf://c/d"\ntarget = "hf://ME/b@main"\n', ["1 and 2", "same target"]),
        (
            '[[model]]\nsource = "a"\ntarget = "t"\n[[model]]\nsource = "b"\ntarget = "x/../t"\n',
            ["1 and 2", "same target"],
        ),
        ('[[model]]\nsource = "a"\ntarget = ""\n', ["target", "a folder"]),
        ('[[model]]\nsource = " "\ntarget = "b"\n', ["source", "a folder"]),
        ('[[model]]\nsource = "a"\ntarget = "b\\u0000"\n', ["target", "a folder"]),
        ('[[model]]\nsource = "a"\ntarget = "~nobody-of-this-name/b"\n', ["home folder", "nobody-of-this-name"]),
        (MODEL + '[model.card]\nresults = "a\\u0000"\n', ["results", "a path"]),
        (MODEL + "[limits]\nthreads = 99999999999\n", ["threads", "at most"]),
        (MODEL + '[limits]\nwork = ""\n', ["work", "a folder"]),
    ],
)
def test_mistakes(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(errors.UsageError) as caught:
        read_job(path)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(errors.MissingError, match=r"none\.toml"):
        read_job(tmp_path / "none.toml")


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.UsageError, match="not a TOML file"):
        read_job(tmp_path / "job.toml")


def test_dots_in_texts_are_no_keys(tmp_path: Path) -> None:
    name = ".".join(["a"] * 16)
    job = read_job(write(tmp_path, f"[[model]]\nsource = 'hf://a/b/{name}'\ntarget = 't'\n#{'.' * 99}"))
    assert job.models[0].source.endswith(name)
