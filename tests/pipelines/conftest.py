"""What tests of jobs share."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from df11.converter.manifest import Manifest
from df11.pipelines import plots, run

_drawn: dict[Hashable, dict[str, bytes]] = {}


@pytest.fixture(autouse=True)
def draw_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the plots of the same tensors once for all jobs of this process: they take most of a small job's time.

    Most jobs here differ only in their origin, which no plot shows. test_report.py draws every time.
    """

    def draw(manifest: Manifest) -> dict[str, bytes]:
        key = (manifest.cast, repr(manifest.files), repr(manifest.tensors))
        if key not in _drawn:
            _drawn[key] = plots.draw_plots(manifest)
        return dict(_drawn[key])

    monkeypatch.setattr(run, "draw_plots", draw)
