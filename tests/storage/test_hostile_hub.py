"""A server without limits: size, time, pages, origins and odd texts, in answers to the client's own questions, too."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import hub as hub_store
from df11.storage import limits, ranges
from df11.storage.address import Address
from df11.storage.answers import wait_asked
from df11.storage.entry import Entry
from df11.storage.secrets import without_secrets
from df11.storage.store import open_source
from tests.support import commands
from tests.support.hub.server import Action, HubServer, drip, status

pytestmark = pytest.mark.usefixtures("client")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "WAITS", (0.0,))


@pytest.fixture
def model(hub: HubServer) -> HubServer:
    hub.create("me/m").commit({"config.json": b"{}", "x.bin": bytes(300_000)})
    return hub


def test_an_answer_that_is_compressed_is_not_unpacked(model: HubServer) -> None:
    bomb = gzip.compress(b'{"a": "' + b" " * 50_000_000 + b'"}')
    model.inject("GET", "/api/models/me/m", status(200, {**JSON, "Content-Encoding": "gzip"}, body=bomb), times=9)
    with pytest.raises(errors.RetryLaterError, match="compressed"):
        open_source("hf://me/m")
    assert {one.headers.get("accept-encoding") for one in model.requests if "/api/models" in one.path} == {"identity"}


def test_an_answer_without_end_is_given_up(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_ANSWER", 100_000)
    model.inject("GET", "/api/models/me/m", status(200, JSON, body=b'{"a": "' + b" " * 200_000 + b'"}'), times=9)
    with pytest.raises(errors.RetryLaterError, match="does not end"):
        open_source("hf://me/m")


def test_an_answer_that_takes_too_long_is_given_up(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_ANSWER", 0.3)
    model.inject("GET", "/api/models/me/m", drip(200), times=9)
    started = time.monotonic()
    with pytest.raises(errors.RetryLaterError, match="too long"):
        open_source("hf://me/m")
    assert time.monotonic() - started < 20


def test_contents_that_come_too_slowly_are_asked_for_again(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_source("hf://me/m")
    entry = store.find(())["x.bin"]
    monkeypatch.setattr(ranges, "SLOW_AFTER", 0.3)
    monkeypatch.setattr(ranges, "LEAST_RATE", 1e9)
    model.inject("GET", "/cdn/", drip(100_000), times=99)
    with store.open(entry) as file, pytest.raises(errors.RetryLaterError, match="too slowly"):
        for _ in file.chunks():
            pass


def test_a_listing_without_end_is_given_up(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model.repository("me/m").commit({f"{number}.txt": b"" for number in range(30)})
    monkeypatch.setattr(hub_store, "MOST_FILES", 20)
    with pytest.raises(errors.UsageError, match="does not end"):
        open_source("hf://me/m").list()


def page(model: HubServer, following: int, body: bytes = b"[]") -> Action:
    """An answer after which another page comes."""
    link = f'<{model.endpoint}/api/models/me/m/tree/main?cursor={following}>; rel="next"'
    return status(200, {**JSON, "Link": link}, body=body)


def test_pages_without_end_are_given_up(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_PAGES", 5)
    for number in range(20):
        model.inject("GET", "/tree/", page(model, number))
    with pytest.raises(errors.UsageError, match=r"does not end.*5 pages"):
        open_source("hf://me/m").list()
    assert model.count("GET", "/tree/") == 5


def test_pages_that_take_too_long_are_given_up(model: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_LISTING", 0.3)
    for number in range(20):
        model.inject("GET", "/tree/", dataclasses.replace(page(model, number), wait=0.2))
    with pytest.raises(errors.UsageError, match="does not end"):
        open_source("hf://me/m").list()
    assert model.count("GET", "/tree/") < 5


def test_pages_in_a_circle(model: HubServer) -> None:
    for number in [1, 2, 3] * 10:
        model.inject("GET", "/tree/", page(model, number))
    with pytest.raises(errors.UsageError, match="leads back"):
        open_source("hf://me/m").list()
    assert model.count("GET", "/tree/") == 4


@pytest.mark.parametrize("what", ["had", "landed"])
def test_only_the_newest_commits_are_asked_for(what: str, model: HubServer) -> None:
    store = open_source("hf://me/m")
    assert isinstance(store, hub_store.HubStore)
    commit = {"id": store.head, "title": "t", "message": "m", "date": "2024-01-01T00:00:00.000Z", "authors": []}
    for number in range(20):
        action = page(model, number, json.dumps([commit]).encode())
        model.inject("GET", "/commits/", action)
        model.inject("GET", "/tree/main", action)
    if what == "had":
        assert not store.had("config.json", Entry.of("config.json", b"another"))
        assert store.had("config.json", Entry.of("config.json", b"{}"))
    else:
        assert store._find_landed("run 1") is None
    assert not model.count("GET", "cursor=")


def test_values_without_end_are_not_made(model: HubServer) -> None:
    body = b"[" + b"[]," * 1_000_000 + b"[]]"
    model.inject("GET", "/tree/", status(200, JSON, body=body), times=9)
    with pytest.raises(errors.LimitError, match="too many values"):
        open_source("hf://me/m").list()
    assert model.count("GET", "/tree/") == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "31536000"}, {"RateLimit": '"api" ; r = 0 ; t = 31536000'}])
@pytest.mark.parametrize("code", [429, 503])
def test_the_client_itself_does_not_wait(
    code: int, headers: dict[str, str], model: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_source("hf://me/m")
    slept: list[float] = []
    monkeypatch.setattr(hub_client.time, "sleep", slept.append)
    model.inject("GET", "/tree/", status(code, headers), times=99)
    with pytest.raises(errors.RetryLaterError, match=str(code)):
        store.list()
    assert model.count("GET", "/tree/") == 2
    assert slept == [hub_client.LONGEST_WAIT]


@pytest.mark.parametrize(("headers", "requests"), [({}, 4), ({"Retry-After": "9"}, 5)])
def test_part_of_an_upload_is_sent_again_alone(
    headers: dict[str, str], requests: int, model: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the server asks for a long wait, of which nobody would hear."""
    monkeypatch.setattr(hub_client.time, "sleep", lambda _: None)
    model.multipart_bytes, model.chunk_bytes = 4 << 20, 5 << 20
    (tmp_path / "x.bin").write_bytes(os.urandom(11 << 20))
    model.inject("PUT", "/upload/", status(503, headers), after=1)
    store = open_source("hf://me/m")
    store.commit([store.put("x.bin", tmp_path / "x.bin")], [], "x")
    assert model.repository("me/m").files()["x.bin"] == (tmp_path / "x.bin").read_bytes()
    assert model.count("PUT", "/upload/") == requests


def test_a_client_that_cannot_connect_keeps_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_session

    session = get_session()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(errors.RetryLaterError, match="no connection"):
        hub_client.call(lambda api: list(api.list_repo_tree("me/m")), "hf://me/m")
    assert get_session() is session


DRIPS = {
    "a header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
    "early hints": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "the size of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
}


@pytest.fixture(params=DRIPS)
def dripping(request: pytest.FixtureRequest, client: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Hub is a server that sends something again and again, for six seconds; the answer does not go on."""
    del client
    begin, again = DRIPS[request.param]
    ended = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(begin)
            for _ in range(120):
                connection.sendall(again)
                if ended.wait(0.05):
                    break

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=answer, args=(listening.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield
        ended.set()
        listening.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("dripping")
def test_an_answer_that_does_not_go_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LONGEST_ANSWER", 0.5)
    with pytest.raises(errors.RetryLaterError, match="takes too long"):
        hub_client.once(lambda api: api.repo_info("me/m"), "hf://me/m")


@pytest.mark.usefixtures("dripping")
def test_contents_that_do_not_go_on_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SLOW_AFTER", 0.5)
    file = ranges.RemoteFile(Address("me/m", "main", "x.bin"), 100_000)
    with pytest.raises(errors.RetryLaterError, match="too slowly"):
        file.fetch(0, bytearray(100_000))


DEEP = b'{"a": ' * 30_000 + b"1" + b"}" * 30_000


@pytest.mark.parametrize("path", ["/api/models/me/m$", "/api/models/me/m/tree/"])
@pytest.mark.parametrize("body", [DEEP, b"[1]", b"7", b'{"sha": 7}', b'[{"type": "file"}]', b"[null]"])
def test_answers_that_no_hub_gives(path: str, body: bytes, model: HubServer) -> None:
    model.inject("GET", path, status(200, JSON, body=body), times=99)
    with pytest.raises(errors.RetryLaterError):
        open_source("hf://me/m").list()


@pytest.mark.parametrize("body", [DEEP, b"[1]", b'{"errors": 7}'])
def test_a_model_card_that_is_answered_with_nonsense(body: bytes, model: HubServer) -> None:
    model.inject("POST", "/api/validate-yaml", status(400, JSON, body=body), times=9)
    with pytest.raises(errors.RetryLaterError, match="cannot be read"):
        hub_client.check_card("# m", "hf://me/m/README.md")


def test_a_range_with_too_many_digits(model: HubServer) -> None:
    file = ranges.RemoteFile(Address("me/m", model.repository("me/m").head, "x.bin"), 300_000)
    odd = status(206, {"Content-Range": f"bytes {'9' * 5000}-1/300000"}, body=b"x")
    model.inject("GET", "/cdn/", odd, times=99)
    with pytest.raises(errors.RetryLaterError):
        file.fetch(0, bytearray(300_000))


@pytest.mark.parametrize("size", ["0", "-5", "x", "9" * 5000])
def test_an_upload_in_parts_of_odd_sizes(size: str, model: HubServer) -> None:
    data = bytes(1000)
    upload = {"href": f"{model.cdn}/upload/x", "header": {"chunk_size": size, "00001": f"{model.cdn}/upload/x"}}
    found = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "actions": {"upload": upload}}
    batch = json.dumps({"transfer": "multipart", "objects": [found]}).encode()
    model.inject("POST", "/info/lfs/objects/batch", status(200, JSON, body=batch), times=9)
    with pytest.raises(errors.RetryLaterError):
        open_source("hf://me/m").put("y.bin", data)


def test_a_file_twice_is_no_listing(model: HubServer) -> None:
    entry = {"type": "file", "path": "x", "size": 1, "oid": "0" * 40}
    model.inject("GET", "/api/models/me/m/tree", status(200, JSON, body=json.dumps([entry, entry]).encode()), times=9)
    with pytest.raises(errors.UsageError, match="twice"):
        open_source("hf://me/m").list()


def test_a_page_elsewhere_gets_no_token(model: HubServer, tmp_path: Path) -> None:
    with HubServer(tmp_path / "elsewhere") as other:
        page = json.dumps([{"type": "file", "path": "x", "size": 1, "oid": "0" * 40}]).encode()
        link = f'<{other.endpoint}/api/models/me/m/tree/main>; rel="next"'
        model.inject("GET", "/api/models/me/m/tree", status(200, {**JSON, "Link": link}, body=page), times=1)
        other.inject("GET", "/api/models/me/m/tree", status(200, JSON, body=b"[]"), times=9)
        open_source("hf://me/m").list()
        (asked,) = [one for one in other.requests if "/tree/" in one.path]
    assert "authorization" not in asked.headers


def test_what_the_client_would_keep_for_a_day_is_not_asked_for(model: HubServer) -> None:
    open_source("hf://me/m").list()
    assert not [one for one in model.requests if "agent-harnesses" in one.path]


@pytest.mark.parametrize(
    "text",
    ["Mon, 01 Jan 99999999999 00:00:00 GMT", "9" * 400, "soon", "-5", "1e9", "\x00", "Thu, 01 Jan 1970 00:00:00 GMT"],
)
def test_odd_times_to_wait(text: str) -> None:
    wait = wait_asked({"retry-after": text})
    assert wait is None or (wait >= 0 and math.isfinite(wait))


@pytest.mark.parametrize(
    "address",
    [
        *("http://user:s3cret@127.0.0.1:1", "ftp://user:s3cret@x", "http://user:s3cret@x:99999", "//s3cret@"),
        *("http://user:s3c@ret@127.0.0.1:99999", "http://user:s3c/ret@127.0.0.1:1", "http://user:s3c?ret@x"),
        *("http://user:s3c ret@127.0.0.1:1", "http://user:s3c@ret@127.0.0.1:1", "http://user:s3cé@ret/@x", "u:s3c/a@x"),
    ],
)
def test_an_endpoints_password_is_not_shown(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    for debug in ([], ["--debug"]):
        result = commands.run("convert", "hf://me/m", tmp_path / "out", *debug)
        assert result.code in (2, 5)
        assert "s3c" not in result.out + result.err


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://", "nonsense", "http://[", "http://x:0"])
def test_an_endpoint_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    commands.run("convert", "hf://me/m", tmp_path / "out").error(2, "HF_ENDPOINT")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [("HF_ENDPOINT", "http://127.0.0.1:99999", "check HF_ENDPOINT"), ("HF_HUB_ETAG_TIMEOUT", "x", "start with HF_")],
)
def test_an_environment_that_the_client_cannot_be_imported_in(name: str, value: str, hint: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "df11", "hub", "pull", "me/m", tmp_path / "out"]  # A process that has not, so far.
    done = subprocess.run(command, env=os.environ | {name: value}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.rstrip().endswith(hint)


@pytest.mark.parametrize(
    "proxy", ["ftp://user:s3cret@x", "http://user:s3c@ret@x:99999", "http://user:s3c/ret@x", "http://user:s3c ret@x:1"]
)
def test_a_proxy_that_is_none(proxy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import close_session

    monkeypatch.delenv("NO_PROXY")
    for name in ("HTTP_PROXY", "http_proxy"):
        close_session()
        monkeypatch.setenv(name, proxy)
        result = commands.run("convert", "hf://me/m", tmp_path / "out")
        close_session()
        monkeypatch.delenv(name)
        assert "s3c" not in result.error(result.code)
        assert result.code in (2, 5)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:a/b@c@host/x: no", "at https://***@host/x: no"),
        ("'http://me@host'", "'http://***@host'"),
        ("//me:x@host", "//***@host"),
        ("hf://me/m@main/x -> hf://me/n@v1", "hf://me/m@main/x -> hf://me/n@v1"),
        ("/tmp//a@b", "/tmp//a@b"),
        ('{"a": "http://host/x", "b": "c@d"}', '{"a": "http://host/x", "b": "c@d"}'),
        ("https://host/x and c@d", "https://host/x and c@d"),
    ],
)
def test_addresses_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_known_secrets_are_found_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "me:pass wo\u00e9d@host:1")
    for spelled in ("pass wo\u00e9d", "pass wo\\xe9d", "pass wo\\u00e9d"):
        assert without_secrets(f"wrong: {spelled}!") == "wrong: ***!"
