"""A server without limits: size, time, pages, origins and odd texts, in answers to the client's own questions, too."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import hub as hub_store
from df11.storage import limits, ranges
from df11.storage.answers import wait_asked
from df11.storage.store import open_source
from tests.support import commands
from tests.support.hub.server import HubServer, drip, status

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
    "address", ["http://user:s3cret@127.0.0.1:1", "ftp://user:s3cret@x", "http://user:s3cret@x:99999", "//s3cret@"]
)
def test_an_endpoints_password_is_not_shown(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    for debug in ([], ["--debug"]):
        result = commands.run("convert", "hf://me/m", tmp_path / "out", *debug)
        assert result.code in (2, 5)
        assert "s3cret" not in result.out + result.err


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


def test_a_proxy_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import close_session

    close_session()
    monkeypatch.setenv("HTTP_PROXY", "ftp://user:s3cret@x")
    result = commands.run("convert", "hf://me/m", tmp_path / "out")
    close_session()
    assert "s3cret" not in result.error(2, "PROXY")
