"""The Hub's client as df11 uses it: retries, waits, timeouts, and one-line errors without secrets."""

from __future__ import annotations

import logging
import math
import sys

import pytest

from df11.formats import errors
from df11.storage import client as hub_client
from df11.storage import limits
from df11.storage.answers import LaterError, explained
from df11.storage.client import call, once, pause, retrying
from tests.support.hub.server import cut, hang, status

WHERE = "hf://me/m"


@pytest.fixture(autouse=True)
def impatient(client, monkeypatch):
    """This process's client, which does not wait."""
    del client
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def repository(hub):
    return hub.create("me/m")


def ask():
    return call(lambda api: api.repo_info("me/m").sha, WHERE)


# Tries.


def test_a_call(repository):
    assert ask() == repository.head


@pytest.mark.parametrize("failures", range(4))
def test_as_many_tries_as_there_are_waits_and_one(failures, hub, repository):
    hub.inject("GET", "/api/models/", status(500), times=failures)
    assert ask() == repository.head
    assert hub.count("GET", "/api/models/") == failures + 1


def test_then_it_gives_up(hub, repository):
    del repository
    hub.inject("GET", "/api/models/", status(500), times=100)
    with pytest.raises(errors.RetryLaterError) as caught:
        ask()
    assert (caught.value.file, caught.value.exit_code) == (WHERE, 5)
    assert hub.count("GET", "/api/models/") == 4
    with pytest.raises(errors.RetryLaterError):
        once(lambda api: api.repo_info("me/m"), WHERE)
    assert hub.count("GET", "/api/models/") == 5


def test_what_is_no_trouble_of_the_network_is_not_tried_again(hub):
    with pytest.raises(errors.MissingError):
        ask()
    assert hub.count("GET", "/api/models/") == 1
    tries = []

    def fail():
        tries.append(None)
        raise errors.ConflictError("x")

    with pytest.raises(errors.ConflictError):
        retrying(fail)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("asked", "seconds"), [(None, (1.5, 2.5)), (0.0, (0, 0)), (17.0, (17, 17)), (1e9, (3600, 3600))]
)
def test_waits(asked, seconds, caplog):
    caplog.set_level(logging.INFO, "df11")
    slept = []
    error = LaterError("trouble", wait=asked, file=WHERE)
    pause(error, 2.0, sleep=slept.append)
    low, high = seconds
    assert low <= slept[0] <= high
    (record,) = caplog.records
    assert (record.event, record.error, record.seconds, record.levelno) == ("retry", error, slept[0], logging.INFO)
    assert "trouble" in record.getMessage()


def test_waits_differ_from_client_to_client():
    slept = []
    for _ in range(20):
        pause(errors.RetryLaterError("trouble"), 2.0, sleep=slept.append)
    assert len(set(slept)) > 1


def test_a_useless_wait_is_none():
    error = LaterError("switched off", wait=math.inf)
    tries = []

    def fail():
        tries.append(None)
        raise error

    with pytest.raises(LaterError) as caught:
        retrying(fail)
    assert caught.value is error
    assert len(tries) == 1


# Timeouts.


def test_a_silent_server_is_given_up(hub, repository, monkeypatch):
    del repository
    monkeypatch.setitem(limits.TIMEOUTS, "read", 0.05)
    hub.inject("GET", "/api/models/", hang, times=100)
    with pytest.raises(errors.RetryLaterError, match="in time"):
        ask()
    assert hub.count("GET", "/api/models/") == 4


def test_timeouts_hold_for_our_calls_only(repository):
    from huggingface_hub import get_session

    session = get_session()
    seen = []
    before = len(session.event_hooks["request"])
    for _ in range(2):
        ask()
    assert len(session.event_hooks["request"]) == before + 1
    session.event_hooks["request"].append(lambda request: seen.append(dict(request.extensions["timeout"])))
    ask()
    once(lambda _: session.get(f"{hub_client.endpoint()}/api/models/me/m", timeout=7), WHERE)
    session.get(f"{hub_client.endpoint()}/api/models/me/m", timeout=None)
    assert seen[0] == limits.TIMEOUTS
    assert set(seen[1].values()) == {7}
    assert set(seen[2].values()) == {None}
    assert repository.head


# Errors.


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (status(401), errors.Df11Error, []),
        (status(403), errors.NotAllowedError, ["403"]),
        (status(403, error_code="GatedRepo"), errors.NotAllowedError, ["must be requested"]),
        (status(404, error_code="RepoNotFound"), errors.MissingError, ["missing, or private"]),
        (status(404, error_code="RevisionNotFound"), errors.MissingError, ["no such branch"]),
        (status(404, error_code="EntryNotFound"), errors.MissingError, ["no such file"]),
        (status(410), errors.MissingError, ["410"]),
        (status(409), errors.ConflictError, ["somebody else"]),
        (status(412), errors.ConflictError, ["somebody else"]),
        (status(422, error_message="the Hub's own words"), errors.UsageError, ["422", "the Hub's own words"]),
        (status(408), errors.RetryLaterError, ["408"]),
        (status(429, {"Retry-After": "9"}), errors.RetryLaterError, ["9 s", "429"]),
        (status(503), errors.RetryLaterError, ["503"]),
        (status(200, {"Content-Type": "application/json"}, body=b"{not JSON"), errors.RetryLaterError, ["cannot be"]),
        (status(200, {"Content-Type": "application/json"}, body=b"[]"), errors.RetryLaterError, ["cannot be"]),
        (cut(after=0), errors.RetryLaterError, ["broke off"]),
    ],
)
def test_what_is_said_of_an_answer(fault, error, words, hub, repository):
    del repository
    hub.inject("GET", "/api/models/", fault, times=100)
    with pytest.raises(error) as caught:
        once(lambda api: api.repo_info("me/m").sha, WHERE)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    for word in (WHERE, *words):
        assert word in line
    for secret in ("hf_test", "Signature", hub.cdn):
        assert secret not in line


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    assert hub_client.endpoint() == "http://127.0.0.1:9"
    with pytest.raises(errors.RetryLaterError, match="no connection"):
        ask()
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub_client.endpoint() == "https://huggingface.co"


def test_what_is_nothing_of_the_hubs_stays_what_it_is():
    for error in (ZeroDivisionError("x"), OSError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, explained(WHERE):
            raise error
        assert caught.value is error
    ours = errors.UsageError("ours")
    with pytest.raises(errors.UsageError) as known, explained(WHERE):
        raise ours
    assert known.value is ours


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'df11\[hub\]'"):
        ask()
