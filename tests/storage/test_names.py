"""Which files belong to a model, by their names; and patterns, which mean what they do in the Hub's client."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import example, given
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401 - the profile of hypothesis
from df11.storage.names import LEFT_OUT_FOLDERS, is_left_out, is_wanted, remarks_on

KEPT = [
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "x.sft", "x.df11"),
    *("config.json", "README.md", "LICENSE", "tokenizer.model", "merges.txt", "pytorch_model.bin", "image.png"),
    *(".gitattributes", ".gitignore", ".hidden", "..hidden", ".swp", "a.swp", "cache", "git", ".gitx", "x.git"),
    *("partial", "x.partial", "x.download", ".x.partial.txt", "x.lock", ".x.lock", "x.parts", "part", "x.part.json"),
    *("incomplete", "aria2.txt", ".aria2x", "nfs01", ".nfs", ".nfsx", "~x", "#x", "x#", "x~y", "_._", "_.x"),
    *("DS_Store", ".DS_Store2", "Thumbs.db.bak", "desktop.ini.txt", "ü.safetensors", "a\nb.txt", " "),
]
LEFT_OUT = [
    *("._", "._model.safetensors", ".DS_Store", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"),
    *(".nfs000000000123abcd", ".fuse_hidden0001", ".Trash-1000", "config.json~", ".~lock.x.odt#", "#config.json#"),
    *(".#config.json", ".config.json.swp", ".config.json.swo", ".config.json.swa"),
    *(".x.df11.partial", ".x.df11.download", ".x.df11.partial.lock", ".x.df11.download.lock.123", ".0123abc.partial"),
    *(".a\nb.partial", "a\nb~"),
]
UNFINISHED = [
    "model.safetensors.aria2",
    "0123abcd.incomplete",
    "model.safetensors.crdownload",
    "model.safetensors.part",
    "model.safetensors.!qB",
    "a\nb.part",
    ".part",
]
PART = st.text(st.sampled_from("abA.~#_-!0"), min_size=1, max_size=8)
PATH = st.lists(PART, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize("name", KEPT)
def test_what_is_a_models(name):
    for path in (name, f"unet/{name}", f"a/{name}/b.txt"):
        assert not is_left_out(path)
    assert not remarks_on([name])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_programs_leave_behind(name):
    for path in (name, f"unet/{name}", f"a/b/{name}"):
        assert is_left_out(path)
        assert not remarks_on([path])
    # A folder with such a name is ordinary.
    assert not is_left_out(f"{name}/config.json")


@pytest.mark.parametrize("name", UNFINISHED)
def test_downloads_that_have_not_ended(name):
    for path in (name, f"unet/{name}", f"a/b/{name}"):
        assert is_left_out(path)
        assert remarks_on([path])[0].startswith(f"{path}: an unfinished download")
    assert not is_left_out(f"{name}/config.json")
    assert not remarks_on([f"{name}/config.json"])


@pytest.mark.parametrize("folder", sorted(LEFT_OUT_FOLDERS))
def test_folders_of_other_programs(folder):
    for path in (f"{folder}/config.json", f"unet/{folder}/model.safetensors", f"{folder}/a/b"):
        assert is_left_out(path)
    for path in (folder, f"a/{folder}"):
        assert is_left_out(path) == (folder == ".git")  # As a file it is one that leads git somewhere else.
    for path in (f"x{folder}/config.json", f"{folder}x/config.json"):
        assert not is_left_out(path)


@pytest.mark.parametrize("name", [".git", ".GIT", ".Git", "git~1", "GIT~1"])
def test_what_makes_git_run_commands_is_left_out(name):
    for path in (name, f"{name}/config", f"a/{name}", f"a/{name}/hooks/x"):
        assert is_left_out(path)
    assert not is_left_out(".gitattributes")
    assert not is_left_out("my.git/x")


@given(folders=st.lists(PART, max_size=3), path=PATH)
def test_names_count_and_not_where_they_are(folders, path):
    assert not LEFT_OUT_FOLDERS & set(folders)
    assert is_left_out("/".join([*folders, path])) == is_left_out(path)
    assert bool(remarks_on(["/".join([*folders, path])])) == bool(remarks_on([path]))
    if remarks_on([path]):
        assert is_left_out(path)


# Patterns.

NAME = st.lists(st.text(st.sampled_from("ab.é[]*?!-/ \n\\"), min_size=1, max_size=6), min_size=1, max_size=3).map(
    "/".join
)
PATTERN = st.text(st.sampled_from("ab.*?[]!-/é^\\"), min_size=1, max_size=8)
PATTERNS = st.lists(PATTERN, max_size=3)


@given(name=NAME, include=PATTERNS, exclude=PATTERNS)
@example(name="a/b.safetensors", include=["a/"], exclude=[])
@example(name="a/b.safetensors", include=["*.safetensors"], exclude=["a/*"])
@example(name="A.bin", include=["a.bin"], exclude=[])
@example(name="a/b/c.txt", include=["a/*.txt"], exclude=["a/b"])
@example(name="a[1].txt", include=["a[1].txt", "a[[]1].txt"], exclude=[])
@example(name="a.txt", include=[], exclude=["*"])
@example(name="a/b.txt", include=["a\\"], exclude=["a\\*.bin"])
def test_patterns_mean_what_they_do_in_the_hubs_client(name, include, exclude):
    expected = list(filter_repo_objects([name], allow_patterns=include or None, ignore_patterns=exclude or None))
    assert is_wanted(name, include, exclude) == (expected == [name])


@given(name=NAME, parts=st.lists(st.sampled_from(["exact", "star", "folder"]), min_size=1, max_size=3))
def test_patterns_that_are_made_of_the_name(name, parts):
    folder = name.rpartition("/")[0]
    made = {
        "exact": "".join(f"[{character}]" if character in "*?[" else character for character in name),
        "star": "*",
        "folder": "".join(f"[{character}]" if character in "*?[" else character for character in folder) + "/",
    }
    patterns = [made[part] for part in parts]
    matches = patterns != ["/"] * len(patterns) or name.startswith("/")
    expected = list(filter_repo_objects([name], allow_patterns=patterns))
    assert is_wanted(name, patterns, []) == (expected == [name])
    if matches:
        assert is_wanted(name, patterns, [])
        assert not is_wanted(name, [], patterns)


def test_without_patterns_everything_is_wanted():
    assert is_wanted("a/b", [], [])
    assert is_wanted("a/b", (), ())
    assert not is_wanted("a/b", ["c"], [])
    assert not is_wanted("a/b", ["a/*"], ["*b"])
    # An empty pattern matches nothing.
    assert not is_wanted("a/b", [""], [])
