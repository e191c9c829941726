"""A job in its own process, started from one that has already imported everything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub  # noqa: F401
import pyarrow.parquet  # noqa: F401

from df11.pipelines import plots, run
from tests.support.hub import models


def work_on(source: str, target: str, work: Path, environment: Mapping[str, str]) -> None:
    """Run a job with one model to success.

    Plots are not drawn: they would take most of the job's time, and nothing is written meanwhile.
    """
    run.draw_plots = lambda _manifest: {plots.path(name): name.encode() for name in plots.NAMES}
    os.environ.clear()
    os.environ.update(environment)
    report = run.run_job(models.a_job(source, target, work))
    assert not report.failures, report.failures
