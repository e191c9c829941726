"""What the Hub for tests answers: one function per endpoint, and the table of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.support.hub import cards
from tests.support.hub.calls import PIECE, Answer, Call, Readable, Slice, json_answer, pieces, refused
from tests.support.hub.repository import Blob, Refusal, Repository, is_lfs, within

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer

# --- repositories ---


def who_am_i(call: Call) -> Answer:
    user = call.signed_in()
    token = {"displayName": "test", "role": "write"}
    return json_answer(
        {
            "type": "user",
            "id": user,
            "name": user,
            "fullname": user,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def create(call: Call) -> Answer:
    user, wanted = call.signed_in(), call.json()
    name = f"{wanted.get('organization') or user}/{wanted['name']}"
    if wanted.get("type") not in (None, "model"):
        raise Refusal(400, "This Hub has models only")
    if not name.startswith(f"{user}/"):
        raise Refusal(
            403, f"You don't have the rights to create a model under the namespace {name.partition('/')[0]!r}"
        )
    url = f"{call.hub.endpoint}/{name}"
    with call.hub.lock:
        if name in call.hub.repositories:
            return json_answer({"error": "You already created this model repo", "url": url, "name": name}, 409)
        call.hub.create(name, private=wanted.get("visibility") == "private")
    return json_answer({"url": url, "name": name})


def delete(call: Call) -> Answer:
    wanted = call.json()
    call.arguments = (f"{wanted.get('organization') or call.signed_in()}/{wanted['name']}",)
    del call.hub.repositories[call.writable().name]
    return Answer(body=b"OK")


def change_settings(call: Call) -> Answer:
    repository, wanted = call.writable(), call.json()
    if "visibility" in wanted:
        repository.private = wanted["visibility"] == "private"
    if "gated" in wanted:
        repository.gated = bool(wanted["gated"])
    return json_answer({"private": repository.private, "gated": "auto" if repository.gated else False})


def create_branch(call: Call) -> Answer:
    repository, name = call.writable(), call.arguments[1]
    if name in repository.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{name}")
    repository.branches[name] = repository.find(call.json().get("startingPoint", "main")).oid
    return Answer(201)


def references(call: Call) -> Answer:
    repository = call.repository()
    branches = [
        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid}
        for n, oid in repository.branches.items()
        if not n.startswith("refs/")
    ]
    requests = [
        {"name": n, "ref": n, "targetCommit": oid} for n, oid in repository.branches.items() if n.startswith("refs/pr/")
    ]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": oid} for n, oid in repository.tags.items()]
    listed = {"branches": branches, "tags": tags, "converts": []}
    return json_answer({**listed, "pullRequests": requests} if call.argument("include_prs") else listed)


# --- reading ---


def model_info(call: Call) -> Answer:
    repository = call.repository()
    commit = repository.find(call.arguments[1] if len(call.arguments) > 1 else "main")
    siblings = []
    for path, blob in sorted(commit.tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if call.argument("blobs"):
            sibling |= {"size": blob.size, "blobId": blob.oid}
            if blob.data is None:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    flags = {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
    names = {"_id": repository.name, "id": repository.name, "modelId": repository.name, "author": repository.owner}
    dates = {"createdAt": repository.commits[0].date, "lastModified": commit.date}
    return json_answer(
        {**names, "sha": commit.oid, **flags, **dates, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
    )


def _entry(repository: Repository, revision: str, path: str, expand: bool) -> dict[str, Any]:
    tree = repository.find(revision).tree
    if path in tree:
        blob = tree[path]
        entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
        if blob.data is None:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    else:
        content = json.dumps([(name, tree[name].oid) for name in within(tree, path)]).encode()
        entry = {
            "type": "directory",
            "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            "size": 0,
            "path": path,
        }
    if expand:
        commit = repository.last_change(path, revision)
        entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        if entry["type"] == "file":
            entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return entry


def _folders(paths: Iterable[str]) -> set[str]:
    return {path[:end] for path in paths for end in range(len(path)) if path[end] == "/"}


def _true(text: str) -> bool:
    return text.lower() in ("true", "1")


def tree(call: Call) -> Answer:
    repository, revision = call.repository(), call.arguments[1]
    folder = call.arguments[2] if len(call.arguments) > 2 else ""
    files = repository.find(revision).tree
    below = within(files, folder)
    if folder and not below:
        raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    paths = {path for path in {*below, *_folders(below)} if path.startswith(f"{folder}/" if folder else "")}
    if not _true(call.argument("recursive")):
        paths = {path for path in paths if "/" not in path[len(folder) + 1 if folder else 0 :]}
    start, size = int(call.argument("cursor", "0")), int(call.argument("limit", str(call.hub.page_size)))
    shown = sorted(paths)[start : start + size]
    expand = _true(call.argument("expand"))
    headers = _link(call, cursor=start + size) if start + size < len(paths) else {}
    return json_answer([_entry(repository, revision, path, expand) for path in shown], headers=headers)


def _link(call: Call, **changed: int) -> dict[str, str]:
    query = urlencode({**call.query, **changed}, doseq=True)
    return {"Link": f'<{call.hub.endpoint}{call.path}?{query}>; rel="next"'}


def paths_info(call: Call) -> Answer:
    repository, revision = call.repository(), call.arguments[1]
    wanted = parse_qs(call.body.read().decode())
    files = repository.find(revision).tree
    known = {*files, *_folders(files)}
    expand = _true(wanted.get("expand", ["false"])[0])
    return json_answer(
        [_entry(repository, revision, path, expand) for path in wanted.get("paths", []) if path in known]
    )


def commits(call: Call) -> Answer:
    history = list(call.repository().history(call.arguments[1]))
    page, size = int(call.argument("p", "0")), int(call.argument("limit", str(call.hub.page_size)))
    shown = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in history[page * size : (page + 1) * size]
    ]
    headers = _link(call, p=page + 1) if (page + 1) * size < len(history) else {}
    return json_answer(shown, headers={**headers, "X-Total-Count": str(len(history))})


def resolve(call: Call) -> Answer:
    repository, revision, path = call.repository(), call.arguments[1], call.arguments[2]
    user = call.user
    if repository.gated and user != repository.owner and user not in repository.readers:
        page = f"{call.hub.endpoint}/{repository.name}"
        reason = f"Access to model {repository.name} is restricted. Visit {page} to ask for access."
        raise Refusal(403 if user else 401, reason, "GatedRepo")
    commit = repository.find(revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.tree:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.tree[path]
    if blob.data is not None:
        return _content(call, blob.data, blob, headers)
    query = urlencode({"filename": path, "Expires": 3600, "Signature": uuid.uuid4().hex})
    location = f"{call.hub.cdn}/cdn/{repository.name}/{blob.sha256}?{query}"
    headers |= {
        "X-Linked-Etag": f'"{blob.etag}"',
        "X-Linked-Size": str(blob.size),
        "Location": location,
        "Vary": "Origin, Accept",
    }
    return Answer(302, headers, f"Found. Redirecting to {location}".encode())


def download(call: Call) -> Answer:
    _, sha256 = call.arguments
    path = call.hub.storage.path(sha256)
    return _content(call, path, Blob(path.stat().st_size, sha256, None), {})


def _content(call: Call, content: bytes | Path, blob: Blob, headers: dict[str, str]) -> Answer:
    """A file, or the requested range of it. Malformed or multiple ranges give the whole file."""
    headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    start, end, status = 0, blob.size, 200
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", "")) if call.keep_range else None
    if found and any(found.groups()):
        first, last = found.groups()
        start = int(first) if first else max(0, blob.size - int(last))
        end = min(blob.size, int(last) + 1) if first and last else blob.size
        if start >= blob.size:
            return Answer(416, {**headers, "Content-Range": f"bytes */{blob.size}"})
        if start < end:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        else:
            start, end = 0, blob.size
    body = content[start:end] if isinstance(content, bytes) else Slice(content, start, end - start)
    return Answer(status, headers, body)


# --- writing ---


def validate_card(call: Call) -> Answer:
    errors, warnings = cards.validate(call.json()["content"])
    if "text/plain" in call.headers.get("Accept", ""):
        return Answer(
            400 if errors else 200,
            {"Content-Type": "text/plain; charset=utf-8"},
            "\n".join(errors or warnings).encode(),
        )
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_answer(messages, 400 if errors else 200)


def preupload(call: Call) -> Answer:
    repository = call.writable()
    present = repository.find(call.arguments[1]).tree
    files = []
    for file in call.json()["files"]:
        path = file["path"]
        lfs = is_lfs(path, file["size"], base64.b64decode(file.get("sample", "")))
        known = {"oid": present[path].etag} if path in present else {}
        files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
    return json_answer({"files": files})


def lfs_batch(call: Call) -> Answer:
    repository, hub = call.writable(), call.hub
    objects = []
    for wanted in call.json()["objects"]:
        sha256, size = wanted["oid"], wanted["size"]
        known = {"oid": sha256, "size": size}
        if sha256 not in repository.objects:
            # Whoever has an address may upload, as the real ones are signed.
            key = uuid.uuid4().hex
            place = f"/{repository.name}/{sha256}"
            upload: dict[str, Any] = {"href": f"{hub.cdn}/upload{place}?Expires=3600&Signature={key}"}
            if size > hub.multipart_bytes:
                parts = range(1, -(-size // hub.chunk_bytes) + 1)
                urls = {
                    f"{part:05}": f"{hub.cdn}/upload{place}/{key}/{part}?Expires=3600&Signature={key}" for part in parts
                }
                upload = {
                    "href": f"{hub.endpoint}/api/complete_multipart{place}/{key}",
                    "header": {"chunk_size": str(hub.chunk_bytes), **urls},
                }
            known["actions"] = {
                "upload": upload,
                "verify": {"href": f"{hub.endpoint}/{repository.name}.git/info/lfs/verify"},
            }
        objects.append(known)
    return json_answer({"transfer": "basic", "objects": objects})


def _receive(hub: HubServer, stream: Readable, name: str, sha256: str | None) -> None:
    """Write a stream to a file of the storage. It appears once complete, if it has this SHA-256."""
    digest = hashlib.sha256()
    partial = hub.storage.path(f"incoming-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            while piece := stream.read(PIECE):
                if sha256:
                    digest.update(piece)
                file.write(piece)
        if sha256 and digest.hexdigest() != sha256:
            raise Refusal(400, f"BadDigest: the content's SHA-256 is {digest.hexdigest()}, not {sha256}")
        partial.replace(hub.storage.path(name))
    finally:
        partial.unlink(missing_ok=True)


def upload(call: Call) -> Answer:
    sha256 = call.arguments[1]
    _receive(call.hub, call.body, sha256, sha256)
    return Answer(headers={"ETag": f'"{sha256}"'})


def upload_part(call: Call) -> Answer:
    name = ".".join(call.arguments[2:])
    _receive(call.hub, call.body, name, None)
    return Answer(headers={"ETag": f'"{name}"'})


def complete_multipart(call: Call) -> Answer:
    _, sha256, key = call.arguments
    paths = [call.hub.storage.path(f"{key}.{part['partNumber']}") for part in call.json()["parts"]]
    if not call.hub.storage.path(sha256).exists():  # else this is the second try after a lost answer
        if not paths or not all(path.exists() for path in paths):
            raise Refusal(400, f"InvalidPart: a part of {sha256} is not there")
        _receive(call.hub, _Joined(paths), sha256, sha256)
    for path in paths:
        path.unlink(missing_ok=True)
    return json_answer({})


class _Joined:
    """Files, one after the other, as one stream."""

    def __init__(self, paths: list[Path]):
        self._pieces = (piece for path in paths for piece in pieces(Slice(path, 0, path.stat().st_size), PIECE))

    def read(self, _size: int = -1, /) -> bytes:
        return next(self._pieces, b"")


def lfs_verify(call: Call) -> Answer:
    repository, wanted = call.writable(), call.json()
    path = call.hub.storage.path(wanted["oid"])
    if not path.exists() or path.stat().st_size != wanted["size"]:
        raise Refusal(422, f"LFS object {wanted['oid']} of {wanted['size']} bytes was not uploaded")
    repository.objects.add(wanted["oid"])
    return json_answer({"message": "ok"})


def commit(call: Call) -> Answer:
    repository, branch, author = call.writable(), call.arguments[1], call.signed_in()
    if call.argument("create_pr"):
        raise Refusal(400, "This Hub takes no pull requests")
    lines = [json.loads(line) for line in call.body.read().splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    with call.hub.lock:
        parent = repository.find(branch)
        if branch not in repository.branches:
            raise Refusal(400, f"{branch} is no branch")
        if not parent.oid.startswith(header.get("parentCommit") or parent.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Blob | None] = {}
        for line in lines:
            changes |= _change(call, repository, parent.tree, line["key"], line["value"])
        oid = repository.apply(branch, changes, header["summary"], header.get("description", ""), author).oid
    return json_answer(
        {"success": True, "commitOid": oid, "commitUrl": f"{call.hub.endpoint}/{repository.name}/commit/{oid}"}
    )


def _change(
    call: Call, repository: Repository, files: Mapping[str, Blob], key: str, value: Mapping[str, Any]
) -> dict[str, Blob | None]:
    path = value.get("path", "")
    match key:
        case "file":
            data = (
                base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
            )
            errors = cards.validate(data.decode())[0] if path == "README.md" else []
            if errors:
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            return {path: Blob(len(data), hashlib.sha256(data).hexdigest(), data)}
        case "lfsFile":
            sha256 = value["oid"]
            if sha256 not in repository.objects:
                raise Refusal(
                    400,
                    "Your push was rejected because an LFS pointer pointed to a file that does not exist: "
                    f"{path} ({sha256})",
                )
            return {path: Blob(call.hub.storage.path(sha256).stat().st_size, sha256, None)}
        case "deletedFile" | "deletedFolder":
            gone = (
                [path]
                if key == "deletedFile" and path in files
                else within(files, path.rstrip("/"))
                if key == "deletedFolder"
                else []
            )
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            return dict.fromkeys(gone)
        case "header":
            return {}
    raise Refusal(400, f"Unknown key {key!r}")


# --- the table ---

_REPOSITORY = r"([^/]+/[^/]+?)"
_REVISION = r"(refs/(?:pr|convert)/[^/]+|[^/]+)"
_MODEL = f"/api/models/{_REPOSITORY}"

_TABLE: list[tuple[str, str, Callable[[Call], Answer]]] = [
    ("GET", "/api/whoami-v2", who_am_i),
    ("POST", "/api/repos/create", create),
    ("DELETE", "/api/repos/delete", delete),
    ("POST", "/api/validate-yaml", validate_card),
    ("POST", f"/api/complete_multipart/{_REPOSITORY}/([^/]+)/([^/]+)", complete_multipart),
    ("GET", f"{_MODEL}", model_info),
    ("GET", f"{_MODEL}/revision/{_REVISION}", model_info),
    ("GET", f"{_MODEL}/refs", references),
    ("GET", f"{_MODEL}/commits/{_REVISION}", commits),
    ("GET", f"{_MODEL}/tree/{_REVISION}", tree),
    ("GET", f"{_MODEL}/tree/{_REVISION}/(.+)", tree),
    ("POST", f"{_MODEL}/paths-info/{_REVISION}", paths_info),
    ("PUT", f"{_MODEL}/settings", change_settings),
    ("POST", f"{_MODEL}/branch/(.+)", create_branch),
    ("POST", f"{_MODEL}/preupload/{_REVISION}", preupload),
    ("POST", f"{_MODEL}/commit/{_REVISION}", commit),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/verify", lfs_verify),
    ("GET", f"/{_REPOSITORY}/resolve/{_REVISION}/(.+)", resolve),
]
_CDN_TABLE: list[tuple[str, str, Callable[[Call], Answer]]] = [
    ("GET", f"/cdn/{_REPOSITORY}/([^/]+)", download),
    ("PUT", f"/upload/{_REPOSITORY}/([^/]+)", upload),
    ("PUT", f"/upload/{_REPOSITORY}/([^/]+)/([^/]+)/([0-9]+)", upload_part),
]
HUB = [(method, re.compile(pattern), function) for method, pattern, function in _TABLE]
CDN = [(method, re.compile(pattern), function) for method, pattern, function in _CDN_TABLE]


def answer(call: Call, table: list[tuple[str, re.Pattern[str], Callable[[Call], Answer]]]) -> Answer:
    """Do what a request asks for."""
    for method, pattern, function in table:
        found = pattern.fullmatch(call.path)
        if found and method == ("GET" if call.method == "HEAD" else call.method):
            call.arguments = tuple(unquote(group) for group in found.groups())
            new = call.hub.renamed.get(call.arguments[0]) if call.arguments else None
            if new:
                query = urlencode(call.query, doseq=True)
                path = call.path[: found.start(1)] + quote(new) + call.path[found.end(1) :]
                return Answer(
                    307,
                    {"Location": f"{path}?{query}" if query else path},
                    f"Temporary Redirect. Redirecting to {path}".encode(),
                )
            try:
                return function(call)
            except Refusal as refusal:
                return refused(refusal)
    return refused(Refusal(404, f"Sorry, we can't find the page you are looking for: {call.method} {call.path}"))
