"""``df11 report``: a self-contained HTML page, and PNGs of its plots, from the manifest of a converted model.

This module computes the values; ``templates/report.html.j2`` holds the page. The page loads nothing, and its
security policy forbids loading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from df11.formats import errors
from df11.pipelines import canvas, plots, rendering, summary, wording
from df11.storage.address import Address, is_address
from df11.version import __version__

if TYPE_CHECKING:
    from df11.converter.cast import Cast
    from df11.converter.manifest import Manifest, TensorRow

PAGE: Final = "report.html"
MOST_TENSORS: Final = 2500
"""Rows in the table of all tensors. If there are more, only the largest are listed."""
MOST_OUTLIERS: Final = 30
MOST_OUTSIDE: Final = 16


MARKS: Final = (b'<meta name="generator" content="df11">', b"Software\0df11")
"""What a page and a picture of ours have near their starts."""


def write_report(
    model: str | os.PathLike[str], output: str | os.PathLike[str], *, title: str | None = None, force: bool = False
) -> list[Path]:
    """Write ``report.html`` and the PNGs of its plots into the folder ``output``, and return their paths.

    ``model``: a converted model folder, a `.df11` file, or an ``hf://`` address of either; only the manifest is
    downloaded. A local model without a manifest is decoded to get the same figures. ``title``: by default the model's
    name. ``force``: replace files there that are no report's. Raises a Df11Error. Needs jinja2, matplotlib and pyarrow.
    """
    from df11.storage.atomic import write_bytes
    from df11.storage.paths import kind_of

    manifest, name = find_manifest(model)
    drawn = plots.plots(manifest)
    contents = {
        PAGE: _render(manifest, name if title is None else title, drawn).encode(),
        **{f"{plot.name}.png": plot.png() for plot in drawn},
    }
    paths = {Path(output) / name: content for name, content in contents.items()}
    for path in paths:
        if not force and kind_of(path) == "file" and not _is_ours(path):
            hint = "choose another folder, or pass --force"
            raise errors.UsageError("this file exists, and is not from a report", file=path, hint=hint)
    for path, content in paths.items():
        write_bytes(path, content, root=Path(output))
    return list(paths)


def _is_ours(path: Path) -> bool:
    from df11.storage.paths import open_regular

    with open_regular(path) as file:
        start = file.read(4096)
    return any(mark in start for mark in MARKS)


def find_manifest(model: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """The manifest of a converted model folder or file, and a name for it. See :func:`write_report`."""
    from df11.converter import parquet
    from df11.converter.files import list_containers
    from df11.converter.manifest import FILE_NAME, FileRow, Manifest, Origin, read_manifest
    from df11.converter.scan import scan
    from df11.converter.settings import thread_count
    from df11.formats.container import Container
    from df11.storage.paths import kind_of, name_of
    from df11.storage.store import open_source

    if is_address(model):
        store = open_source(os.fspath(model))
        found = read_manifest(store)
        if found is None:
            hint = "download it, then report on the folder"
            raise errors.MissingError(f"it has no {FILE_NAME}", file=store.locate(""), hint=hint)
        return found, Address.parse(os.fspath(model)).repository
    path = Path(model)
    if kind_of(path / FILE_NAME) == "file":
        return parquet.read(path), name_of(path)
    files: list[FileRow] = []
    rows: list[TensorRow] = []
    cast: Cast = None
    for container_path in list_containers(path):
        name = container_path.name if container_path == path else container_path.relative_to(path).as_posix()
        with Container(container_path) as container:
            source = container.source
            is_rounded = any(container.info(key).exact is False for key in container.keys())
            cast = "bf16" if is_rounded else cast
            writer = container.writer
            size = container.size
        files.append(
            FileRow(name, size, None, f"{name.removesuffix('.df11')}.safetensors", source.bytes, source.sha256)
        )
        rows += scan(container_path, name, threads=thread_count(None))
    return Manifest(Origin(), cast, writer, tuple(files), tuple(rows)), name_of(path)


def render_report(manifest: Manifest, title: str) -> str:
    """The page. ``title`` may hold anything. The same manifest and title give the same page.

    Needs jinja2 and matplotlib.
    """
    return _render(manifest, title, plots.plots(manifest))


def _render(manifest: Manifest, title: str, drawn: Sequence[plots.Plot]) -> str:
    template = rendering.html_environment().get_template("report.html.j2")
    from markupsafe import Markup

    origin, total, outliers = manifest.origin, summary.total(manifest), summary.outliers(manifest)
    parts = summary.parts(manifest)
    stacks, outside = summary.stacks(manifest)
    proofs = summary.proofs(manifest)
    page: str = template.render(
        title=" ".join(title.split()) or "df11 report",
        version=__version__,
        light=canvas.LIGHT,
        dark=canvas.DARK,
        # Drawn by our own code, which escapes the names. Nothing else goes into the page unescaped.
        pictures={plot.name: Markup(plot.svg()) for plot in drawn},  # noqa: S704
        tool=manifest.tool,
        cast=manifest.cast,
        origin=origin,
        source_page=wording.hub_page(origin.repository, origin.commit, origin.path),
        folder=wording.folder_name(origin.repository),
        total=total,
        sizes=[sizes for sizes, _ in parts] + ([total] if len(parts) > 1 else []),
        stacks=[_spread(stack.name, stack.by_layer(summary.average_bits), stack.rows) for stack in stacks],
        kinds=[row for stack in stacks for row in _kinds(stack)],
        outside=[_spread(name, {}, rows) for name, rows in summary.alike(outside)[:MOST_OUTSIDE]],
        exponents=list(_exponents(manifest)),
        dtypes=summary.by_dtype(manifest),
        outlier_weights=summary.OUTLIER_WEIGHTS,
        most_outliers=MOST_OUTLIERS,
        outliers=outliers,
        shown_outliers=[
            {
                "number": number,
                "outlier": outlier,
                "entropy_bound": summary.entropy_bound([outlier.row]),
                "excess": f"{outlier.excess_bytes:+,.0f}",
            }
            for number, outlier in enumerate(outliers.tensors[:MOST_OUTLIERS], 1)
        ],
        proofs=proofs,
        changed=[proof for proof in proofs if not proof.exact],
        checksums=summary.checksum_list(manifest).splitlines(),
        tensors=_largest(manifest.tensors),
    )
    return page


class _Spread(NamedTuple):
    # Bits per weight of some matrices: for each layer, if there are layers, and overall.
    name: str
    matrices: int
    least: float | None
    mean: float | None
    most: float | None
    layer: int | None
    """The layer with the highest value."""
    entropy_bound: float | None


def _spread(name: str, bits: Mapping[int, float], rows: Sequence[TensorRow]) -> _Spread:
    layer = max(bits, key=lambda layer: (bits[layer], -layer), default=None)
    return _Spread(
        name,
        len(rows),
        min(bits.values(), default=None),
        summary.average_bits(rows),
        None if layer is None else bits[layer],
        layer,
        summary.entropy_bound(rows),
    )


def _kinds(stack: summary.Stack) -> Iterator[_Spread]:
    for kind, layers in stack.kinds.items():
        bits = {layer: summary.average_bits(rows) or 0.0 for layer, rows in layers.items()}
        if bits:
            yield _spread(f"{stack.name}.{kind}", bits, [row for rows in layers.values() for row in rows])


class _Exponents(NamedTuple):
    # The exponents of part of the model; ``name`` is None for the whole.
    name: str | None
    counted: float | None
    """Share of the weights whose exponents were counted; the other shares refer to these."""
    used: int
    most: int
    most_share: float
    quartiles: list[int]
    zero: float
    not_finite: float


def _exponents(manifest: Manifest) -> Iterator[_Exponents]:
    parts = summary.parts(manifest)
    named: list[tuple[str | None, int, Sequence[TensorRow]]] = [(part.name, part.weights, rows) for part, rows in parts]
    if len(parts) > 1:
        named.append((None, summary.total(manifest).weights, manifest.tensors))
    for name, weights, rows in named:
        counts, counted = summary.exponents(rows)
        if counted:
            most = int(np.argmax(counts))
            yield _Exponents(
                name,
                summary.share(counted, weights),
                int(np.count_nonzero(counts)),
                most - 127,
                counts[most] / counted,
                [value - 127 for value in summary.quantiles(counts, (0.25, 0.5, 0.75))],
                counts[0] / counted,
                counts[255] / counted,
            )


def _largest(tensors: Sequence[TensorRow]) -> Sequence[TensorRow]:
    # The largest MOST_TENSORS, in their original order.
    by_size = sorted(range(len(tensors)), key=lambda index: (-tensors[index].stored_bytes, index))
    return [tensors[index] for index in sorted(by_size[:MOST_TENSORS])]
