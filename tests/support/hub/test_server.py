"""The real client with the Hub for tests: repositories, uploads, reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.support.hub.server import HubServer, Repository, status
from tests.support.hub.steps import CARD, WEIGHTS, add, fails, fetch

# --- repositories ---


def test_create(hub: HubServer, client: HfApi) -> None:
    assert str(client.create_repo("me/model", private=True)) == f"{hub.endpoint}/me/model"
    assert hub.repository("me/model").private
    fails(409, lambda: client.create_repo("me/model"))
    assert client.create_repo("me/model", exist_ok=True).repo_id == "me/model"
    fails(403, lambda: client.create_repo("you/model"))
    fails(401, lambda: client.create_repo("me/other", token=False))
    client.create_repo("me/other")
    assert not hub.repository("me/other").private
    assert list(hub.repository("me/other").files()) == [".gitattributes"]


def test_settings_and_delete(client: HfApi, repository: Repository) -> None:
    for private, gated in ((True, "auto"), (False, False)):
        client.update_repo_settings("me/model", private=private, gated=gated)  # type: ignore[arg-type]
        assert (repository.private, repository.gated) == (private, bool(gated))
    client.delete_repo("me/model")
    assert not client.repo_exists("me/model")
    fails(404, lambda: client.delete_repo("me/model"))


def test_who_am_i(client: HfApi) -> None:
    assert client.whoami()["name"] == "me"
    fails(401, lambda: client.whoami(token="hf_unknown"))


def test_references(client: HfApi, repository: Repository) -> None:
    first, second = (commit.oid for commit in repository.commits)
    repository.tags["v1"] = first
    repository.branches["refs/pr/1"] = first
    client.create_branch("me/model", branch="side/way", revision="v1")
    fails(409, lambda: client.create_branch("me/model", branch="side/way"))
    references = client.list_repo_refs("me/model", include_pull_requests=True)
    assert {branch.name: branch.target_commit for branch in references.branches} == {"main": second, "side/way": first}
    assert {tag.name: tag.target_commit for tag in references.tags} == {"v1": first}
    assert [request.ref for request in references.pull_requests or ()] == ["refs/pr/1"]

    for revision, oid in {
        "v1": first,
        "refs/pr/1": first,
        "side/way": first,
        second[:12]: second,
        "main": second,
    }.items():
        assert client.model_info("me/model", revision=revision).sha == oid
        path = client.hf_hub_download("me/model", ".gitattributes", revision=revision)
        assert Path(path).parent.name == oid
    assert fetch(f"{client.endpoint}/me/model/resolve/refs/pr/1/.gitattributes")[0] == 200  # as browsers write it
    for revision in ("v2", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            client.model_info("me/model", revision=revision)
        with pytest.raises(RevisionNotFoundError):
            client.hf_hub_download("me/model", "config.json", revision=revision)
        with pytest.raises(RevisionNotFoundError):
            client.create_commit("me/model", [add("a.txt", b"a")], commit_message="Add", revision=revision)

    client.create_commit("me/model", [add("a.txt", b"a")], commit_message="Add", revision="side/way")
    assert repository.head == second
    assert repository.files("side/way").keys() == {".gitattributes", "a.txt"}


# --- uploads ---


def test_upload_folder_and_read_back(hub: HubServer, client: HfApi, tmp_path: Path) -> None:
    hub.multipart_bytes, hub.chunk_bytes = 1 << 16, 1 << 15
    rng = np.random.default_rng(1)
    contents = {
        "model.df11": rng.bytes(1000),
        "parts/exact.safetensors": rng.bytes(3 << 15),
        "parts/more.safetensors": rng.bytes((3 << 15) + 1),
        "parts/largest-basic.bin": rng.bytes(1 << 16),
        "notes.txt": "grün".encode(),
        "noise.dat": b"\0\1\2",
        "empty.safetensors": b"",
        "README.md": CARD,
    }
    for name, content in contents.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    client.create_repo("me/model")
    oid = client.upload_folder(
        repo_id="me/model", folder_path=tmp_path / "tree", commit_message="All", commit_description="of it"
    ).oid

    repository = hub.repository("me/model")
    assert repository.head == oid
    files = repository.files()
    del files[".gitattributes"]
    assert files == contents
    assert repository.hashes() == {
        name: hashlib.sha256(content).hexdigest() for name, content in repository.files().items()
    }
    last = repository.commits[-1]
    assert (last.title, last.message, last.author, set(last.paths)) == ("All", "of it", "me", set(contents))
    assert hub.count("PUT", r"/upload/.*/\d\?") == 3 + 4
    assert hub.count("PUT", "/upload/") == 3 + 4 + 3  # plus two basic ones, and the binary file with an unknown name
    # No parts are left.
    lfs = {
        hashlib.sha256(contents[name]).hexdigest()
        for name in contents
        if name not in ("notes.txt", "empty.safetensors", "README.md")
    }
    assert {path.name for path in hub.storage.folder.iterdir()} == lfs

    snapshot = Path(client.snapshot_download("me/model"))
    assert snapshot.name == oid
    assert {
        str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    } == repository.files()
    verified = client.verify_repo_checksums("me/model")
    assert (verified.checked_count, verified.mismatches, verified.missing_paths) == (len(contents) + 1, [], [])
    entries = {entry.path: entry for entry in client.list_repo_tree("me/model", recursive=True)}
    assert {path for path, entry in entries.items() if getattr(entry, "lfs", None)} == set(contents) - {
        "notes.txt",
        "empty.safetensors",
        "README.md",
    }


def test_what_is_there_is_not_uploaded_again(hub: HubServer, client: HfApi, repository: Repository) -> None:
    before = repository.head
    for content in (WEIGHTS, b"{}"):
        name = "config.json" if content == b"{}" else "model.safetensors"
        assert client.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="me/model").oid == before
    client.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id="me/model")
    assert repository.read("copy.safetensors") == WEIGHTS
    assert hub.count("PUT", "/upload/") == 0

    # Another repository does not know it.
    client.create_repo("me/other")
    client.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="me/other")
    assert hub.count("PUT", "/upload/") == 1


def test_upload_from_disk_before_the_commit(hub: HubServer, client: HfApi, tmp_path: Path) -> None:
    client.create_repo("me/model")
    path = tmp_path / "shard.df11"
    path.write_bytes(WEIGHTS)
    operation = add("shard.df11", path)
    client.preupload_lfs_files("me/model", [operation])
    path.unlink()
    repository = hub.repository("me/model")
    assert "shard.df11" not in repository.files()
    client.create_commit("me/model", [operation], commit_message="Add")
    assert repository.read("shard.df11") == WEIGHTS


def test_chain_of_commits(hub: HubServer, client: HfApi) -> None:
    client.create_repo("me/model")
    repository = hub.repository("me/model")
    first = repository.head
    head = first
    for number in range(3):
        head = client.create_commit(
            "me/model", [add(f"{number}.bin", b"%d" % number)], commit_message=f"Add {number}", parent_commit=head
        ).oid
    assert repository.head == head
    assert [commit.title for commit in repository.commits] == ["initial commit", "Add 0", "Add 1", "Add 2"]
    assert [commit.parent for commit in repository.commits][1:] == [commit.oid for commit in repository.commits][:-1]
    fails(
        412, lambda: client.create_commit("me/model", [add("3.bin", b"3")], commit_message="Add 3", parent_commit=first)
    )
    assert repository.head == head


def test_of_two_commits_at_once_one_fails(client: HfApi, repository: Repository) -> None:
    parent = repository.head
    operations = [add(f"{number}.bin", b"%d" % number) for number in range(8)]
    client.preupload_lfs_files("me/model", operations, free_memory=False)

    def commit(operation: CommitOperationAdd) -> int:
        try:
            client.create_commit("me/model", [operation], commit_message="Add", parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(commit, operations)) == [200] + 7 * [412]
    assert repository.commits[-1].parent == parent


def test_delete_and_copy(client: HfApi, repository: Repository) -> None:
    repository.commit({"a/b/c.txt": b"c", "a/d.txt": b"d"})
    operations: list[Any] = [
        CommitOperationDelete("a/b/"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationDelete("config.json"),
    ]
    client.create_commit("me/model", operations, commit_message="Delete and copy")
    assert repository.files().keys() == {".gitattributes", "model.safetensors", "copy.safetensors", "a/d.txt"}
    assert repository.read("copy.safetensors") == WEIGHTS
    for missing in ("config.json", "a/b/"):
        with pytest.raises(EntryNotFoundError):
            client.create_commit("me/model", [CommitOperationDelete(missing)], commit_message="Delete")


@pytest.mark.usefixtures("client")
def test_lfs_contents_are_checked(hub: HubServer, repository: Repository) -> None:
    new = b"new weights"
    sha256, token = hashlib.sha256(new).hexdigest(), {"Authorization": "Bearer hf_test"}
    batch = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": len(new)}]}).encode()
    _, _, answer = fetch(f"{hub.endpoint}/me/model.git/info/lfs/objects/batch", "POST", token, batch)
    actions = json.loads(answer)["objects"][0]["actions"]

    def commit() -> tuple[int, bytes]:
        lines = [
            {"key": "header", "value": {"summary": "Add"}},
            {"key": "lfsFile", "value": {"path": "new.bin", "algo": "sha256", "oid": sha256}},
        ]
        code, _, answer = fetch(
            f"{hub.endpoint}/api/models/me/model/commit/main",
            "POST",
            token,
            b"\n".join(json.dumps(line).encode() for line in lines),
        )
        return code, answer

    def verify(size: int) -> int:
        return fetch(actions["verify"]["href"], "POST", token, json.dumps({"oid": sha256, "size": size}).encode())[0]

    before = repository.head
    assert fetch(actions["upload"]["href"], "PUT", body=new[:-1] + b"S")[0] == 400
    assert verify(len(new)) == 422
    assert commit()[0] == 400
    assert fetch(actions["upload"]["href"], "PUT", body=new)[0] == 200
    assert verify(len(new) + 1) == 422
    code, answer = commit()
    assert code == 400
    assert b"does not exist" in answer
    assert repository.head == before
    assert verify(len(new)) == 200
    assert commit()[0] == 200
    assert repository.read("new.bin") == new


@pytest.mark.parametrize("part", [1, 2])
def test_multipart_contents_are_checked(hub: HubServer, client: HfApi, repository: Repository, part: int) -> None:
    hub.multipart_bytes, hub.chunk_bytes = 10, 8
    hub.inject("PUT", rf"/upload/.*/{part}\?", status(200, headers={"ETag": '"it was not stored"'}))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'new\.bin'"):
        client.upload_file(path_or_fileobj=b"twelve bytes", path_in_repo="new.bin", repo_id="me/model")
    assert hub.requests[-1].status == 400
    client.upload_file(path_or_fileobj=b"twelve bytes", path_in_repo="new.bin", repo_id="me/model")
    assert repository.read("new.bin") == b"twelve bytes"


# --- reading ---


def test_tree_in_pages(hub: HubServer, client: HfApi, repository: Repository) -> None:
    hub.page_size = 4
    repository.commit({f"shards/{number:02}.txt": b"%d" % number for number in range(10)}, summary="Add shards")
    everything: list[Any] = list(client.list_repo_tree("me/model", recursive=True, expand=True))
    assert hub.count("GET", "/tree/") == 4
    assert [entry.path for entry in everything] == sorted([*repository.files(), "shards"])
    assert {entry.path: entry.last_commit.title for entry in everything if entry.last_commit} == {
        path: "Change files"
        if path in ("model.safetensors", "config.json")
        else "initial commit"
        if path == ".gitattributes"
        else "Add shards"
        for path in [*repository.files(), "shards"]
    }
    weights = next(entry for entry in everything if entry.path == "model.safetensors")
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (
        len(WEIGHTS),
        len(WEIGHTS),
        hashlib.sha256(WEIGHTS).hexdigest(),
    )
    config = next(entry for entry in everything if entry.path == "config.json")
    assert (config.size, config.lfs, config.blob_id) == (2, None, hashlib.sha1(b"blob 2\0{}").hexdigest())

    assert [entry.path for entry in client.list_repo_tree("me/model")] == [
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "shards",
    ]
    assert len(list(client.list_repo_tree("me/model", "shards"))) == 10
    with pytest.raises(EntryNotFoundError):
        list(client.list_repo_tree("me/model", "nowhere"))
    assert [
        entry.path for entry in client.get_paths_info("me/model", ["config.json", "shards", "nowhere"], expand=True)
    ] == ["config.json", "shards"]
    assert client.list_repo_files("me/model") == sorted(repository.files())
    siblings: Any = client.model_info("me/model", files_metadata=True).siblings
    assert siblings[2].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_commits_in_pages(hub: HubServer, client: HfApi, repository: Repository) -> None:
    for number in range(5):
        repository.commit({"config.json": b"%d" % number}, summary=f"Change {number}")
    hub.page_size = 3
    listed = client.list_repo_commits("me/model")
    assert hub.count("GET", "/commits/") == 3
    assert [(commit.commit_id, commit.title) for commit in listed] == [
        (commit.oid, commit.title) for commit in repository.commits[::-1]
    ]
    assert len(client.list_repo_commits("me/model", revision=repository.commits[3].oid)) == 4
    assert [repository.read("config.json", commit.commit_id) for commit in listed[:2]] == [b"4", b"3"]


def test_who_may_read(hub: HubServer, client: HfApi) -> None:
    hub.tokens |= {"hf_you": "you", "hf_friend": "friend"}
    for name, flags in {"private": {"private": True}, "gated": {"gated": True}}.items():
        repository = hub.create(f"me/{name}", **flags)
        repository.readers.add("friend")
        repository.commit({"config.json": b"{}"})
    reads: list[Callable[[str, str | bool], object]] = [
        lambda name, token: client.model_info(name, token=token),
        lambda name, token: list(client.list_repo_tree(name, token=token)),
        lambda name, token: client.get_paths_info(name, ["config.json"], token=token),
        lambda name, token: client.list_repo_commits(name, token=token),
        lambda name, token: client.list_repo_refs(name, token=token),
        lambda name, token: client.get_hf_file_metadata(
            url=f"{hub.endpoint}/{name}/resolve/main/config.json", token=token
        ),
    ]
    for read in reads:
        for name in ("me/private", "me/missing"):
            for token, code in {"hf_you": 404, "hf_unknown": 401}.items():
                assert isinstance(fails(code, lambda n=name, t=token, r=read: r(n, t)), RepositoryNotFoundError) == (
                    code == 404
                )  # type: ignore[misc]
            assert isinstance(fails(401, lambda n=name, r=read: r(n, False)), RepositoryNotFoundError)  # type: ignore[misc]
        for token in ("hf_test", "hf_friend"):
            read("me/private", token)
            read("me/gated", token)
    # The contents of a gated repository are listed for everybody.
    for read in reads[:-1]:
        read("me/gated", False)
    assert isinstance(fails(401, lambda: reads[-1]("me/gated", False)), GatedRepoError)
    assert isinstance(fails(403, lambda: reads[-1]("me/gated", "hf_you")), GatedRepoError)

    for token, code in {"hf_friend": 403, "hf_you": 404}.items():
        operation = add("a.txt", b"a")
        fails(code, lambda t=token, o=operation: client.create_commit("me/private", [o], commit_message="Add", token=t))  # type: ignore[misc]


def test_missing_files(client: HfApi, repository: Repository) -> None:
    with pytest.raises(EntryNotFoundError):
        client.hf_hub_download("me/model", "nowhere.json")
    code, headers, _ = fetch(f"{client.endpoint}/me/model/resolve/main/nowhere.json", "HEAD")
    assert (code, headers["x-error-code"], headers["x-repo-commit"]) == (404, "EntryNotFound", repository.head)
    assert not client.file_exists("me/model", "nowhere.json")
    assert client.file_exists("me/model", "config.json")


def test_renamed(hub: HubServer, client: HfApi, repository: Repository) -> None:
    hub.rename("me/model", "me/better")
    assert hub.repository("me/better") is repository
    assert client.model_info("me/model").id == "me/better"
    assert Path(client.hf_hub_download("me/model", "model.safetensors")).read_bytes() == WEIGHTS
    assert client.list_repo_files("me/model") == client.list_repo_files("me/better")
    client.upload_file(path_or_fileobj=b"new weights", path_in_repo="new.bin", repo_id="me/model")
    assert repository.read("new.bin") == b"new weights"
    status_code, headers, _ = fetch(f"{hub.endpoint}/me/model/resolve/refs%2Fpr%2F1/config.json?download=true")
    assert (status_code, headers["location"]) == (307, "/me/better/resolve/refs%2Fpr%2F1/config.json?download=true")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_ranges(hub: HubServer, client: HfApi, repository: Repository, name: str) -> None:
    content = repository.read(name)
    url = f"{hub.endpoint}/me/model/resolve/{repository.head}/{name}"
    _, headers, _ = fetch(url, "HEAD")
    lfs = name == "model.safetensors"
    assert headers["x-repo-commit"] == repository.head
    assert headers["x-linked-size" if lfs else "content-length"] == str(len(content))
    assert headers.get("x-linked-etag") == (f'"{hashlib.sha256(content).hexdigest()}"' if lfs else None)
    last = len(content) - 1
    for asked, start, end in [
        ("0-0", 0, 1),
        ("1-", 1, None),
        ("-1", last, None),
        (f"0-{last + 5}", 0, None),
        (f"-{last + 9}", 0, None),
    ]:
        response = huggingface_hub.utils.get_session().get(
            url, headers={**client._build_hf_headers(), "Range": f"bytes={asked}"}
        )
        assert response.status_code == 206
        assert response.content == content[start:end]
        stop = (end or len(content)) - 1
        assert response.headers["Content-Range"] == f"bytes {start}-{stop}/{len(content)}"
    response = huggingface_hub.utils.get_session().get(url, headers={"Range": f"bytes={last + 1}-"})
    assert (response.status_code, response.headers["Content-Range"]) == (416, f"bytes */{len(content)}")
    for asked in ("bytes=0-1,3-4", "pages=1-2", "bytes=-", "bytes=1-0"):
        response = huggingface_hub.utils.get_session().get(url, headers={"Range": asked})
        assert (response.status_code, response.content) == (200, content)
    # The token goes to the Hub, and not to the target of its redirect.
    assert {request.cdn for request in hub.requests if "authorization" in request.headers} == {False}
    assert bool(hub.count("GET", "/cdn/")) == lfs


def test_a_token_at_the_other_origin_is_noted(hub: HubServer, repository: Repository) -> None:
    url = f"{hub.cdn}/cdn/me/model/{repository.hashes()['model.safetensors']}?filename=model.safetensors"
    assert fetch(url)[2] == WEIGHTS
    assert not hub.leaks
    assert fetch(url, headers={"Authorization": "Bearer hf_test"})[0] == 400
    assert [request.path for request in hub.leaks] == ["/" + url.split("/", 3)[3]]
    hub.requests.clear()
