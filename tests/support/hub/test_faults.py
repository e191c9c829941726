"""The Hub for tests: its checks of model cards, its faults on demand, and its end."""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
)

from tests.support.hub.server import (
    Action,
    HubServer,
    Repository,
    corrupt,
    cut,
    drip,
    hang,
    ignore_range,
    landed,
    slow,
    status,
    truncated,
)
from tests.support.hub.steps import CARD, WEIGHTS, add, fails, fetch

# --- cards ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"license": "other", "license_name": "mine", "license_link": "LICENSE"}, None),
        ({"license": "other"}, "license_name"),
        ({"license": "mine"}, "license"),
        ({"base_model_relation": "compressed"}, "base_model_relation"),
        ({"pipeline_tag": "text-to-anything"}, "pipeline_tag"),
        ({"tags": "df11"}, "tags"),
        ({"tags": ["df11", 11]}, "tags"),
        ({"language": ["en", "english"]}, "language"),
        ({"language": "en"}, None),
        ({"base_model": ["you/model", "not a name"]}, "base_model"),
        ({"library_name": ["df11"]}, "library_name"),
    ],
)
def test_cards(
    hub: HubServer, client: HfApi, repository: Repository, change: dict[str, object], message: str | None
) -> None:
    card = f"---\n{yaml.safe_dump({**next(yaml.safe_load_all(CARD)), **change})}---\n# Title\n".encode()
    if message is None:
        client.create_commit("me/model", [add("README.md", card)], commit_message="Add a card")
        assert repository.read("README.md") == card
        return
    with pytest.raises(ValueError, match=f'"{message}"'):
        client.create_commit("me/model", [add("README.md", card)], commit_message="Add a card")
    # Nor is it accepted if the client does not ask first.
    hub.inject("POST", "validate-yaml", status(200, body=b'{"errors": [], "warnings": []}'))
    with pytest.raises(BadRequestError, match="Invalid metadata"):
        client.create_commit("me/model", [add("README.md", card)], commit_message="Add a card")
    assert "README.md" not in repository.files()


def test_card_is_checked_in_plain_text(hub: HubServer) -> None:
    for content, code, text in [
        (CARD, 200, b""),
        (CARD.replace(b"apache-2.0", b"mine"), 400, b'"license" must be one of ['),
    ]:
        body = json.dumps({"content": content.decode(), "repoType": "model"}).encode()
        status_code, _, answer = fetch(f"{hub.endpoint}/api/validate-yaml", "POST", {"Accept": "text/plain"}, body)
        assert status_code == code
        assert answer.startswith(text)


@pytest.mark.parametrize("content", [b"# Title\n", b"---\n---\n# Title\n"])
@pytest.mark.usefixtures("repository")
def test_card_without_metadata(client: HfApi, content: bytes) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        client.create_commit("me/model", [add("README.md", content)], commit_message="Add a card")


@pytest.mark.usefixtures("repository")
def test_card_that_is_no_yaml(client: HfApi) -> None:
    with pytest.raises(ValueError, match="YAML Metadata Error"):
        client.create_commit("me/model", [add("README.md", b"---\na: [\n---\n")], commit_message="Add a card")


# --- faults ---


def test_status(hub: HubServer, client: HfApi, repository: Repository) -> None:
    hub.inject(
        "POST", "/commit/", status(503, headers={"Retry-After": "7"}, error_code="Odd", error_message="Come back")
    )
    error = fails(503, lambda: client.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="me/model"))
    assert (error.response.headers["Retry-After"], error.response.headers["X-Error-Code"]) == ("7", "Odd")
    assert "Come back" in str(error)
    assert len(repository.commits) == 2
    client.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="me/model")
    assert len(repository.commits) == 3
    assert [request.status for request in hub.requests if "/commit/" in request.path] == [503, 200]


def test_landed(hub: HubServer, client: HfApi, repository: Repository) -> None:
    for number, code in enumerate((500, None)):
        hub.inject("POST", "/commit/", landed(code))
        with pytest.raises(HfHubHTTPError if code else Exception):
            client.upload_file(path_or_fileobj=b"%d" % number, path_in_repo="a.txt", repo_id="me/model")
        assert repository.read("a.txt") == b"%d" % number
    assert len(repository.commits) == 4


def test_landed_multipart_is_completed_by_the_next_try(hub: HubServer, client: HfApi, repository: Repository) -> None:
    hub.multipart_bytes, hub.chunk_bytes = 10, 8
    hub.inject("POST", "/complete_multipart/", landed())
    client.upload_file(path_or_fileobj=b"twelve bytes", path_in_repo="new.bin", repo_id="me/model")
    assert repository.read("new.bin") == b"twelve bytes"
    assert hub.count("POST", "/complete_multipart/") == 2


@pytest.mark.usefixtures("repository")
def test_cut_answer(hub: HubServer, client: HfApi) -> None:
    hub.inject("GET", "/cdn/.*filename=model.safetensors", cut(1000))
    url = f"{hub.endpoint}/me/model/resolve/main/model.safetensors"
    _, headers, _ = fetch(url)
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(headers["location"])
    assert caught.value.partial == WEIGHTS[:1000]
    assert caught.value.expected == len(WEIGHTS) - 1000
    # The client retries.
    hub.inject("GET", "/cdn/", cut(5000))
    assert Path(client.hf_hub_download("me/model", "model.safetensors")).read_bytes() == WEIGHTS
    assert [request.sent for request in hub.requests if request.cdn] == [1000, 5000, len(WEIGHTS)]


def test_cut_upload(hub: HubServer, client: HfApi, repository: Repository) -> None:
    content = np.random.default_rng(2).bytes(4 << 20)
    hub.inject("PUT", "/upload/", cut(1 << 20), times=2)
    client.upload_file(path_or_fileobj=content, path_in_repo="new.bin", repo_id="me/model")
    assert repository.read("new.bin") == content
    uploads = [(request.received, request.status) for request in hub.requests if request.method == "PUT"]
    assert uploads == [(1 << 20, 0), (1 << 20, 0), (4 << 20, 200)]
    hub.inject("POST", "/commit/", cut(0))
    with pytest.raises(Exception, match=r"(?i)disconnect|reset|closed|EOF"):
        client.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="me/model")
    assert "b.txt" not in repository.files()
    assert not list(hub.storage.folder.glob("incoming-*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.usefixtures("client")
def test_wrong_contents(hub: HubServer, repository: Repository, name: str) -> None:
    content = repository.read(name)
    place = f"/cdn/.*filename={name}" if name == "model.safetensors" else f"/resolve/.*{name}"

    def download() -> bytes:
        response = huggingface_hub.utils.get_session().get(
            f"{hub.endpoint}/me/model/resolve/main/{name}", headers={"Range": "bytes=0-"}
        )
        assert int(response.headers["Content-Length"]) == len(response.content)
        return bytes(response.content)

    hub.inject("GET", place, truncated(1))
    assert download() == content[:-1]
    hub.inject("GET", place, corrupt(1))
    assert download() == content[:1] + bytes([content[1] ^ 1]) + content[2:]
    hub.inject("GET", place, corrupt(1 << 40))
    assert download() == content[:-1] + bytes([content[-1] ^ 1])
    hub.inject("GET", place, drip(10 * len(content)))
    assert download() == content
    hub.inject("GET", place, slow(0.01))
    assert download() == content


@pytest.mark.usefixtures("repository")
def test_ignored_range(hub: HubServer) -> None:
    url = f"{hub.endpoint}/me/model/resolve/main/config.json"
    hub.inject("GET", "/resolve/", ignore_range)
    assert fetch(url, headers={"Range": "bytes=1-1"})[::2] == (200, b"{}")
    assert fetch(url, headers={"Range": "bytes=1-1"})[::2] == (206, b"}")


@pytest.mark.usefixtures("repository")
def test_times_and_order(hub: HubServer) -> None:
    hub.inject("GET|HEAD", "/resolve/.*config", status(500), times=2, after=1)
    hub.inject("GET", "/resolve/.*download=true", status(502))
    url = f"{hub.endpoint}/me/model/resolve/main/config.json"
    seen = [fetch(url, method)[0] for method in ("GET", "HEAD")]
    seen += [fetch(f"{url}?download=true")[0] for _ in range(3)]
    assert seen == [200, 500, 500, 502, 200]
    assert hub.count("GET", "config.json$") == 1
    assert hub.count("GET|HEAD", "config.json") == 5
    assert hub.count("GET", "download=true") == 3


@pytest.mark.usefixtures("repository")
def test_client_tries_again_without_waiting(hub: HubServer, client: HfApi) -> None:
    hub.inject("POST", "/preupload/", status(429, headers={"Retry-After": "3600"}))
    hub.inject("POST", "/preupload/", status(503), times=3)
    client.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="me/model")
    assert [request.status for request in hub.requests if "/preupload/" in request.path] == [429, 503, 503, 503, 200]


# --- the server itself ---


@pytest.mark.parametrize("action", [hang, slow(3600), drip(0.001)])
def test_end_while_clients_wait(tmp_path: Path, action: Action) -> None:
    outcomes: list[Exception] = []

    def wait_for(url: str, body: bytes | None) -> None:
        try:
            fetch(url, "POST" if body else "GET", body=body)
        except (OSError, http.client.HTTPException) as error:
            outcomes.append(error)

    with HubServer(tmp_path) as hub:
        repository = hub.create("me/model")
        repository.commit({"a.bin": b"abc"})
        idle = http.client.HTTPConnection(urllib.parse.urlsplit(hub.endpoint).netloc, timeout=60)
        idle.request("GET", "/me/model/resolve/main/.gitattributes")
        idle.getresponse().read()
        hub.inject("GET|POST", ".", action, times=4)
        targets = [
            (f"{hub.endpoint}/me/model/resolve/main/.gitattributes", None),
            (f"{hub.cdn}/cdn/me/model/{repository.hashes()['a.bin']}", None),
            (f"{hub.endpoint}/api/validate-yaml", json.dumps({"content": "x" * 1000}).encode()),
        ]
        threads = [threading.Thread(target=wait_for, args=target) for target in targets]
        for thread in threads:
            thread.start()
        while len(hub.requests) < 1 + len(targets):
            threading.Event().wait(0.01)
        assert not outcomes
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == len(targets)
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        fetch(hub.endpoint)


def test_environment_of_another_process(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    code = """
import huggingface_hub
from huggingface_hub import constants
huggingface_hub.create_repo("me/model")
huggingface_hub.upload_file(path_or_fileobj=b"weights", path_in_repo="a.bin", repo_id="me/model")
print(huggingface_hub.hf_hub_download("me/model", "a.bin"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path / "home")
    assert path.read_bytes() == b"weights"
    assert "HF_TOKEN" not in hub.environment(tmp_path, token=None)


def test_large_files_are_not_copied(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WEIGHTS)
    repository = hub.create("me/model")
    repository.commit({"model.safetensors": path, "notes.md": path.parent / "model.safetensors"})
    assert repository.read("model.safetensors") == WEIGHTS
    stored = hub.storage.path(hashlib.sha256(WEIGHTS).hexdigest())
    assert stored.samefile(path)


@pytest.fixture(autouse=True)
def _no_defect_goes_unseen() -> Iterator[None]:
    """The fixtures of `hub` check what the server recorded; its threads must be gone, too."""
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("hub-")]
