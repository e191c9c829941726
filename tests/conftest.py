"""The loopback Hub as a fixture, and this process's client pointed at it."""

from __future__ import annotations

import functools
import os
import ssl
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.support.hub.server import HubServer, Repository
from tests.support.hub.steps import WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ssl_context = functools.cache(ssl.create_default_context)
"""Clients load all root certificates on start, which takes longer than a test's requests; nothing here uses TLS."""


@pytest.hookimpl(tryfirst=True)  # Before pytest selects by marker.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that talk to the Hub: with ``-m hub``, an older client has to pass them too."""
    for item in items:
        if isinstance(item, pytest.Function) and "hub" in item.fixturenames:
            item.add_marker("hub")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub where user "me" has the token "hf_test".

    It fails the test if it has a defect itself, or if a token was sent to the wrong origin.
    """
    with HubServer(tmp_path / "hub-storage") as server:
        yield server
    assert not server.errors, server.errors[0]
    assert not server.leaks


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    """This process's client talks to `hub`, with its own cache and the token of "me", without sleeps between tries."""
    import huggingface_hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    environment = hub.environment(tmp_path / "hf-home")
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    # Values that were read from the environment on import, here and in libraries that copied them.
    home = environment["HF_HOME"]
    cache = f"{home}/hub"
    read_at_import = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": home,
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "HF_ASSETS_CACHE": f"{home}/assets",
        "HF_XET_CACHE": f"{home}/xet",
        "HF_TOKEN_PATH": f"{home}/token",
        "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens",
        "AGENT_HARNESSES_PATH": f"{home}/.agent_harnesses.json",
    }
    for module in [
        module
        for name, module in sys.modules.items()
        if name.split(".")[0] in ("huggingface_hub", "transformers", "diffusers")
    ]:
        for name in read_at_import.keys() & vars(module).keys():
            if isinstance(vars(module)[name], str):
                monkeypatch.setattr(module, name, read_at_import[name])
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(constants, name, True)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.setattr(constants, name, False)
    monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # of huggingface_hub.create_repo and the like

    monkeypatch.setattr(ssl, "create_default_context", _ssl_context)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)

    _http.close_session()
    with warnings.catch_warnings():
        # The client uploads with an argument that its HTTP library has deprecated.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        yield huggingface_hub.HfApi()
    _http.close_session()


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    """ "me/model" with weights (LFS) and a configuration (in git)."""
    repository = hub.create("me/model")
    repository.commit({"model.safetensors": WEIGHTS, "config.json": b"{}"})
    return repository
