"""What tests of this Hub share."""

from __future__ import annotations

import http.client
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

WEIGHTS = np.random.default_rng(0).bytes(100_000)
CARD = (
    b"---\nlicense: apache-2.0\nbase_model: you/model\nbase_model_relation: quantized\npipeline_tag: text-to-image\n"
    b"tags: [df11]\n---\n# Title\n"
)


def add(path: str, content: bytes | Path) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)


def fails(code: int, action: Callable[[], object]) -> HfHubHTTPError:
    """The client's error, which must have this status."""
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError) as caught:
        action()
    assert caught.value.response.status_code == code
    return caught.value


def fetch(
    url: str, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request without the client: status, headers in lower case, body."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        connection.request(
            method, f"{parts.path}?{parts.query}" if parts.query else parts.path, body, dict(headers or {})
        )
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()
