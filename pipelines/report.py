"""``df11 report``: one self-contained page in HTML, and PNGs of its plots, from the manifest of a converted tree.

The page loads nothing, and its security policy forbids it to. All names in a manifest are untrusted: whatever is written here is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from df11.formats import errors
from df11.formats.hub import Address, is_address
from df11.pipelines import canvas, plots, summary, wording
from df11.version import __version__

if TYPE_CHECKING:
    from df11.converter.manifest import Manifest, TensorRow
    from df11.converter.plan import Cast

PAGE: Final = "report.html"
MOST_TENSORS: Final = 2500
"""Rows of the table of all tensors; of more, the largest are listed."""
MOST_OUTLIERS: Final = 30
MOST_OUTSIDE: Final = 16
LONGEST_NAME: Final = 200
_FOLDER: Final = Path(__file__).parent


def write_report(
    tree: str | os.PathLike[str], output: str | os.PathLike[str], *, title: str | None = None
) -> list[Path]:
    """Write ``report.html`` and the PNGs of its plots into the folder ``output``, and return their paths. By default the tree's name is the title.

    ``tree``: a converted folder, a `.df11` file, or an ``hf://`` address of either, of which only the manifest is downloaded. A local one without a
    manifest is decoded to get the same figures. Raises a Df11Error. Needs matplotlib and pyarrow.
    """
    from df11.formats.writer import AtomicWriter, make_parents

    manifest, name = read_tree(tree)
    drawn = plots.plots(manifest)
    contents = {
        PAGE: _render(manifest, name if title is None else title, drawn).encode(),
        **{f"{plot.name}.png": plot.png() for plot in drawn},
    }
    paths = []
    for name, content in contents.items():
        path = Path(output) / name
        make_parents(path)
        with AtomicWriter(path) as writer:
            writer.write(content)
            writer.commit()
        paths.append(path)
    return paths


def read_tree(tree: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """The manifest of a converted tree or file, and a name for it. See :func:`write_report`."""
    from df11.converter import manifest as manifests
    from df11.converter.convert import thread_count
    from df11.converter.files import open_tree
    from df11.converter.tree import list_containers
    from df11.formats.container import Container

    if is_address(tree):
        address = Address.parse(os.fspath(tree))
        opened = open_tree(str(address))
        for file in opened.files:
            if str(file.name) == manifests.FILE_NAME:
                return manifests.Manifest.from_bytes(file.read_bytes(), file.label), address.repository
        raise errors.MissingError(
            f"it has no {manifests.FILE_NAME}", file=opened.label, hint="download it, and make the report of the folder"
        )
    path = Path(tree)
    if (path / manifests.FILE_NAME).is_file():
        return manifests.read(path), path.resolve().name
    files: list[manifests.FileRow] = []
    rows: list[TensorRow] = []
    cast: Cast = None
    for container_path in list_containers(path):
        name = container_path.name if container_path == path else container_path.relative_to(path).as_posix()
        with Container(container_path) as container:
            source = container.source
            cast = "bf16" if source.cast == "bf16" else cast
            writer = container.writer
            size = container.size
        files.append(
            manifests.FileRow(
                name, size, None, f"{name.removesuffix('.df11')}.safetensors", source.bytes, source.sha256
            )
        )
        rows += manifests.scan(container_path, name, jobs=thread_count(None))
    return manifests.Manifest(manifests.Origin(), cast, writer, tuple(files), tuple(rows)), path.resolve().name


def render_report(manifest: Manifest, title: str) -> str:
    """The page. ``title`` may hold anything. The same manifest and title give the same page. Needs matplotlib."""
    return _render(manifest, title, plots.plots(manifest))


def _render(manifest: Manifest, title: str, drawn: Sequence[plots.Plot]) -> str:
    style = _style()
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src 'none'; base-uri 'none'; form-action 'none'"
    pictures = {plot.name: f"<figure>{plot.svg()}</figure>" for plot in drawn}
    shown_title = _text(" ".join(title.split()) or "df11 report")
    sections = [
        ("converted", "What was converted", _converted(manifest)),
        ("sizes", "Sizes", _sizes(manifest, pictures.get("sizes", ""))),
        ("layers", "Bits a weight by layer", _layers(manifest, pictures.get("layers", ""))),
        ("exponents", "Exponents", _exponents(manifest, pictures.get("exponents", ""))),
        ("outliers", "Outlier tensors", _outliers(manifest, pictures.get("outliers", ""))),
        ("proof", "The proof chain", _proof(manifest)),
        ("tensors", "All tensors", _tensors(manifest)),
    ]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-heading">\n<h2 id="{name}-heading">{heading}</h2>\n{content}\n</section>'
        for name, heading, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{shown_title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{shown_title}</h1>
{_key_figures(manifest)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Made by df11 {_text(__version__)} from the manifest, which was written by {_text(manifest.tool)}. All figures are measured.</p></footer>
<script>{script}</script>
</body>
</html>
"""


def _style() -> str:
    def variables(palette: canvas.Palette, shade: str) -> str:
        return "\n".join([*(f"  --{role}: {colour};" for role, colour in palette.items()), f"  --shade: {shade};"])

    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return style.replace("@LIGHT@", variables(canvas.LIGHT, "#f3f5f7")).replace(
        "@DARK@", variables(canvas.DARK, "#161b22")
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


# Pieces of HTML. Whatever comes from a manifest goes through _text or _name.


def _text(text: str) -> str:
    return html.escape(wording.visible(text))


def _name(name: str) -> str:
    return f"<code>{html.escape(wording.fitted(name, LONGEST_NAME))}</code>"


def _table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, sortable: bool = False
) -> str:
    """A table that scrolls by itself where it is too wide; a head that begins with ``#`` is that of a column of numbers."""
    kinds = [' class="n"' if head.startswith("#") else "" for head in heads]
    lines = [
        "".join(f'<th scope="col"{kind}>{head.removeprefix("#")}</th>' for head, kind in zip(heads, kinds, strict=True))
    ]
    for row in rows:
        first, *others = zip(row, kinds, strict=True)
        lines.append(
            f'<th scope="row"{first[1]}>{first[0]}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell, kind in others)
        )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines[1:])
    mark = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table{mark}><caption>{caption}</caption>'
        f"<thead><tr>{lines[0]}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _beside(figure: str, content: str) -> str:
    return f'<div class="beside two">{figure}<div>{content}</div></div>' if figure else content


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{term}</dt><dd>{value}</dd>" for term, value in facts) + "</dl>"


def _bytes(number: int) -> str:
    return f"{number:,}"


# The sections.


def _key_figures(manifest: Manifest) -> str:
    total = summary.total(manifest)
    figures = [("containers", wording.size(total.container_bytes))]
    if total.cast:
        figures.append(("source, F32" if total.cast == total.tensors else "source", wording.size(total.source_bytes)))
    if total.weights:
        figures += [
            ("the same in BF16", wording.size(total.bf16_bytes)),
            ("of BF16, all counted", wording.percent(total.ratio)),
        ]
        figures += [
            ("bits a weight", wording.bits(total.bits_per_weight)),
            ("floor: entropy + 8", wording.bits(total.floor_bits)),
        ]
    return (
        '<dl class="figures">'
        + "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in figures)
        + "</dl>"
    )


def _converted(manifest: Manifest) -> str:
    total, origin = summary.total(manifest), manifest.origin
    facts = []
    if origin.repository is None:
        facts.append(("source", "local files"))
    else:
        page = wording.hub_page(origin.repository, origin.commit, origin.path)
        name = _text(origin.repository + (f"/{origin.path}" if origin.path else ""))
        facts.append(("source", name if page is None else f'<a href="{html.escape(page)}" rel="noreferrer">{name}</a>'))
    if origin.commit is not None:
        facts.append(("at commit", _name(origin.commit)))
    facts += [
        ("converted by", _text(manifest.tool)),
        ("options", "F32 tensors rounded to BF16" if manifest.cast else "none: every tensor keeps its dtype"),
        (
            "holds",
            f"{wording.count(total.tensors, 'tensor')} in {wording.count(total.files, 'file')}, {wording.count(total.weights, 'BF16 weight')}",
        ),
    ]
    if total.cast:
        kept = total.cast - total.changed
        facts.append(
            (
                "cast from F32",
                f"{wording.count(total.cast, 'tensor')}; {kept:,} of them without any change, {total.changed:,} with rounded values",
            )
        )
    return _facts(facts)


def _sizes(manifest: Manifest, figure: str) -> str:
    parts = [sizes for sizes, _ in summary.parts(manifest)]
    if not parts:
        return "<p>There are no files.</p>"
    rows = [*parts, summary.total(manifest)] if len(parts) > 1 else parts
    heads = [
        "part",
        "#tensors",
        "#source",
        "#in BF16",
        "#coded",
        "#verbatim",
        "#containers",
        "#of BF16",
        "#of source",
        "#bits a weight",
        "#floor",
    ]
    cells = [
        [
            _name(row.name) if index < len(parts) else "all",
            _bytes(row.tensors),
            _bytes(row.source_bytes),
            _bytes(row.bf16_bytes),
            _bytes(row.coded_bytes),
            _bytes(row.verbatim_bytes),
            _bytes(row.container_bytes),
            wording.percent(row.ratio),
            wording.percent(row.source_ratio),
            wording.bits(row.bits_per_weight),
            wording.bits(row.floor_bits),
        ]
        for index, row in enumerate(rows)
    ]
    meanings = _facts(
        [
            ("source", "the safetensors files that were converted"),
            ("in BF16", "all tensors, two bytes a weight where they decode to BF16; no headers"),
            ("coded, verbatim", "tensors as they are stored: compressed, or as they are where that would gain nothing"),
            ("containers", "the .df11 files, headers included"),
            ("bits a weight", "of the tensors that decode to BF16; tables and checksums count"),
            ("floor", "entropy of their exponents, tensor by tensor, and 8 bits for sign and mantissa"),
        ]
    )
    return _beside(figure, meanings) + _table("Sizes in bytes.", heads, cells, label="Sizes by part")


def _layers(manifest: Manifest, figure: str) -> str:
    stacks, outside = summary.stacks(manifest)
    if not stacks and not outside:
        return "<p>No matrix decodes to BF16.</p>"
    bits_heads = ["#number", "#least", "#mean", "#most", "#in layer", "#floor"]
    content = details = ""
    if stacks:
        rows = [[_name(stack.name), *_spread(stack.by_layer(summary.average_bits), stack.rows)] for stack in stacks]
        content = _table(
            "Bits a weight of all matrices of a layer.",
            ["layers", *bits_heads],
            rows,
            label="Bits a weight by stack of layers",
        )
        rows = [
            [
                _name(f"{stack.name}.{kind}"),
                *_spread({layer: summary.average_bits(found) or 0.0 for layer, found in layers.items()}, of_kind),
            ]
            for stack in stacks
            for kind, layers in stack.kinds.items()
            if (of_kind := [row for found in layers.values() for row in found])
        ]
        table = _table(
            "Bits a weight of the matrices of each kind, by layer.",
            ["matrices", *bits_heads],
            rows,
            label="Bits a weight by kind of matrix",
        )
        details = f"<details><summary>{wording.count(len(rows), 'kind')} of matrices</summary>{table}</details>"
    if outside:
        rows = [
            [
                _name(name),
                _bytes(len(found)),
                wording.bits(summary.average_bits(found)),
                wording.bits(summary.floor_bits(found)),
            ]
            for name, found in summary.alike(outside)[:MOST_OUTSIDE]
        ]
        caption = f"Matrices{' outside these stacks' if stacks else ''}, the largest. A star stands for any number."
        content += _table(caption, ["matrices", "#number", "#bits a weight", "#floor"], rows, label="Other matrices")
    return _beside(figure, content) + details


def _spread(bits: Mapping[int, float], rows: Sequence[TensorRow]) -> list[str]:
    most = max(bits, key=lambda layer: (bits[layer], -layer))
    values = (min(bits.values()), summary.average_bits(rows), bits[most])
    return [_bytes(len(rows)), *map(wording.bits, values), str(most), wording.bits(summary.floor_bits(rows))]


def _exponents(manifest: Manifest, figure: str) -> str:
    parts = summary.parts(manifest)
    rows = []
    for sizes, tensors in [*parts, (summary.total(manifest), manifest.tensors)] if len(parts) > 1 else parts:
        counts, counted = summary.exponents(tensors)
        if not counted:
            continue
        most = int(np.argmax(counts))
        middle = summary.quantiles(counts, (0.25, 0.5, 0.75))
        rows.append(
            [
                "all" if tensors is manifest.tensors else _name(sizes.name),
                wording.percent(summary.share(counted, sizes.weights)),
                _bytes(int(np.count_nonzero(counts))),
                f"{most - 127} ({wording.percent(counts[most] / counted)})",
                " / ".join(str(value - 127) for value in middle),
                f"{counts[0] / counted:.2g}",
                f"{counts[255] / counted:.2g}",
            ]
        )
    if not rows:
        return f"<p>No tensor that decodes to BF16 has {summary.OUTLIER_WEIGHTS:,} weights or more, so that no exponents were counted.</p>"
    heads = ["part", "#counted", "#used", "#most frequent", "#quartiles", "#zero", "#infinite, NaN"]
    words = (
        f"<p>The exponents of tensors of {summary.OUTLIER_WEIGHTS:,} weights or more: a weight with exponent e lies between 2<sup>e</sup> and "
        "2<sup>e+1</sup>. Zeros and subnormal numbers have one of their own, as have infinity and NaN; the histogram leaves zeros out.</p>"
    )
    return _beside(
        figure,
        words
        + _table(
            "How many weights were counted, and how many of them are zero, infinite or not a number.",
            heads,
            rows,
            label="Exponents by part",
        ),
    )


def _outliers(manifest: Manifest, figure: str) -> str:
    found = summary.outliers(manifest)
    if found.usual is None:
        return _beside(
            figure,
            f"<p>No tensor that decodes to BF16 has {summary.OUTLIER_WEIGHTS:,} weights or more: none can be an outlier.</p>",
        )
    words = (
        f"<p>The median tensor of {summary.OUTLIER_WEIGHTS:,} weights or more takes {found.usual:.2f} bits a weight. "
        f"{wording.count(len(found.tensors), 'tensor is', 'tensors are')} more than {found.limit:.2f} bits away from it.</p>"
    )
    if not found.tensors:
        return _beside(figure, words)
    rows = [
        [
            _bytes(number),
            _name(outlier.row.name),
            _bytes(outlier.row.elements),
            wording.bits(outlier.bits),
            wording.bits(summary.floor_bits([outlier.row])),
            f"{outlier.excess_bytes:+,.0f}",
        ]
        for number, outlier in enumerate(found.tensors[:MOST_OUTLIERS], 1)
    ]
    heads = ["#no.", "tensor", "#weights", "#bits a weight", "#floor", "#bytes beyond the median"]
    more = f" The {MOST_OUTLIERS} that matter most." if len(found.tensors) > MOST_OUTLIERS else ""
    caption = f"Outliers, by the bytes that they take more, or less, than the median would.{more}"
    return _beside(figure, words) + _table(caption, heads, rows, label="Outlier tensors")


def _proof(manifest: Manifest) -> str:
    proofs = summary.proofs(manifest)
    if not proofs:
        return "<p>There are no files.</p>"
    name = wording.folder_name(manifest.origin.repository)
    changed = [proof for proof in proofs if not proof.exact]
    segments = sum(proof.segments for proof in proofs)
    steps = [
        "Each <b>source file</b> was hashed as it was read: its SHA-256 stands in the container and below. The Hub lists the same for its files.",
        "Each tensor is cut into <b>segments</b>. A segment carries two XXH3-64 checksums: of the bytes that are stored, and of those that they "
        f"decode to. There are {segments:,}; the manifest lists every one.",
        "Each <b>container</b> has a SHA-256 of its own, which the Hub lists; the manifest gives it where a job has uploaded the container.",
        "<b>Restoring</b> decodes every segment, checks both checksums, writes the source's own header before the tensors, and compares the SHA-256 "
        "of it all with the source's.",
    ]
    if changed:
        steps.append(
            f"In {wording.count(len(changed), 'file')} the cast from F32 <b>has rounded values</b>, "
            f"of {wording.count(sum(proof.changed for proof in changed), 'tensor')}: "
            "their F32 values are not in the containers. What can be restored, bit for bit, is a BF16 file."
        )
    commands = [
        f"df11 verify {name}",
        f"df11 verify --against SOURCE {name}",
        f"df11 restore {'--bf16 ' if changed else ''}{name} restored",
    ]
    checksums = summary.checksum_list(manifest)
    check = f"cd restored && sha256sum --check <<'END'\n{checksums}END" if checksums else ""
    heads = ["source file, SHA-256", "#bytes", "container, SHA-256 if known", "#bytes", "#segments", "restores to"]
    rows = [
        [
            _name(proof.file.source_file) + _hash(proof.file.source_sha256),
            _bytes(proof.file.source_bytes),
            _name(proof.file.file) + _hash(proof.file.sha256),
            _bytes(proof.file.bytes),
            _bytes(proof.segments),
            "the source, byte for byte"
            if proof.exact
            else f"BF16: {proof.changed:,} of {wording.count(proof.cast, 'tensor')} changed",
        ]
        for proof in proofs
    ]
    return (
        f"<ol>{''.join(f'<li>{step}</li>' for step in steps)}</ol>"
        + _table("Files and their hashes.", heads, rows, label="Files and their hashes")
        + "<h3>Check it</h3>"
        + f"<p>With the converted folder at hand, here called <code>{name}</code>:</p><pre>{html.escape(chr(10).join(commands))}</pre>"
        + (
            f"<p>The restored files, by a program that knows nothing of df11:</p><pre>{html.escape(check)}</pre>"
            if check
            else ""
        )
    )


def _hash(value: str | None) -> str:
    return "" if value is None else f'<br><code class="hash">{_text(value)}</code>'


def _tensors(manifest: Manifest) -> str:
    if not manifest.tensors:
        return "<p>There are no tensors.</p>"
    shown: Sequence[TensorRow] = manifest.tensors
    caption = "Click on a column's name to sort. Stored: bytes. XXH3: of the decoded bytes of the first segment, and how many segments follow."
    if len(shown) > MOST_TENSORS:
        largest = sorted(range(len(shown)), key=lambda index: (-shown[index].stored_bytes, index))[:MOST_TENSORS]
        caption = f"The {MOST_TENSORS:,} largest of {len(shown):,}; the manifest lists all. " + caption
        shown = [manifest.tensors[index] for index in sorted(largest)]
    several = len(manifest.files) > 1
    cast = any(row.exact is not None for row in shown)
    heads = [
        "tensor",
        *(["file"] if several else []),
        "dtype",
        *(["from F32"] if cast else []),
        "shape",
        "encoding",
        "#stored",
        "#bits a weight",
        "#exponent entropy",
        "XXH3",
    ]
    table = _table(
        caption, heads, (_tensor(row, several=several, cast=cast) for row in shown), label="All tensors", sortable=True
    )
    return f"<details><summary>{wording.count(len(shown), 'row')}</summary>{table}</details>"


def _tensor(row: TensorRow, *, several: bool, cast: bool) -> list[str]:
    checksums = f"<code>{row.decoded_xxh3[0]:016x}</code>" if row.decoded_xxh3 else "-"
    if len(row.decoded_xxh3) > 1:
        checksums += f" +{len(row.decoded_xxh3) - 1:,}"
    entropy = "-" if row.exponent_entropy is None else f"{row.exponent_entropy:.3f}"
    return [
        _name(row.name),
        *([_name(row.file)] if several else []),
        _text(row.dtype),
        *([{None: "-", True: "exact", False: "rounded"}[row.exact]] if cast else []),
        "x".join(map(str, row.shape)) or "scalar",
        row.encoding,
        _bytes(row.stored_bytes),
        wording.bits(row.bits_per_weight),
        entropy,
        checksums,
    ]
