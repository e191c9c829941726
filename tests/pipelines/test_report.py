from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import df11
from df11.converter import parquet
from df11.converter.exponents import ExponentCounts
from df11.converter.manifest import FILE_NAME, Manifest, Origin
from df11.formats import errors
from df11.pipelines import canvas, plots, report, summary, wording
from tests.support import manifests as made
from tests.support import sources


class Page(html.parser.HTMLParser):
    """A parsed page: every element with its attributes, the tables, and the contents of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {
            "script": [],
            "style": [],
            "h1": [],
            "pre": [],
            "text": [],
            "desc": [],
            "code": [],
        }
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("meta", "br", "link", "img", "input"):
            return
        self._open.append(tag)
        if tag in self.contents:
            self.contents[tag].append("")
        if tag == "div" and attributes.get("class") == "scroll":
            self._rows = self.tables[attributes["aria-label"] or ""] = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            if tag in self.contents:
                self.contents[tag][-1] += data
        if "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def render(manifest: Manifest, title: str = "a title") -> Page:
    return Page(report.render_report(manifest, title))


def number(text: str) -> float:
    return float(re.sub(r"[, %]", "", text))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder of two parts, without a manifest, made of F32 and BF16."""
    folder = tmp_path_factory.mktemp("model")
    sources.write(
        folder / "model" / "text" / "model.safetensors",
        [
            sources.bf16("model.embed.weight", (300, 400), 1),
            *(sources.bf16(f"model.layers.{layer}.up.weight", (256, 256), layer) for layer in range(4)),
            sources.bf16("model.layers.0.norm.weight", (256,), 9),
            sources.random_tensor("ids", "I64", (50,), 2),
        ],
    )
    sources.write(
        folder / "model" / "vae" / "part.safetensors",
        [sources.f32("exact", (300, 300), 3, exact=True), sources.f32("rounded", (300, 300), 4)],
    )
    df11.convert(folder / "model", folder / "model-df11", cast="bf16")
    (folder / "model-df11" / FILE_NAME).unlink(missing_ok=True)
    return folder


def entropy_of(bits: np.ndarray) -> float:
    counts = np.bincount((bits >> 7) & 0xFF, minlength=256)
    shares = counts[counts > 0] / len(bits)
    return float(-(shares * np.log2(shares)).sum())


def test_figures_are_those_of_the_files(models: Path):
    """Every column of the table of sizes, from file sizes, NumPy and the containers."""
    manifest, name = report.find_manifest(models / "model-df11")
    assert name == "model-df11"
    head, *rows = render(manifest).tables["Sizes by part"]
    assert head[:7] == ["part", "tensors", "source", "in BF16", "coded", "verbatim", "containers"]
    found = {row[0]: row for row in rows}
    assert list(found) == ["text", "vae", "all"]
    bf16_of = {"text": 2 * (120_000 + 4 * 65_536 + 256) + 400, "vae": 2 * 180_000}
    for part, path in (("text", "text/model"), ("vae", "vae/part")):
        source, container = models / "model" / f"{path}.safetensors", models / "model-df11" / f"{path}.df11"
        row = found[part]
        assert number(row[2]) == source.stat().st_size
        assert number(row[3]) == bf16_of[part]
        assert number(row[6]) == container.stat().st_size
        assert number(row[7]) == pytest.approx(100 * container.stat().st_size / bf16_of[part], abs=0.051)
        assert number(row[8]) == pytest.approx(100 * container.stat().st_size / source.stat().st_size, abs=0.051)
        stored, coded, weights, entropy_bits = 0, 0, 0, 0.0
        with df11.open(container) as opened:
            assert number(row[1]) == len(opened)
            for key in opened.keys():
                info = opened.info(key)
                coded += info.stored_bytes * (info.encoding == "df11")
                if info.dtype == "BF16":
                    stored += info.stored_bytes
                    weights += info.elements
                    entropy_bits += info.elements * entropy_of(opened.tensor(key).reshape(-1))
            assert number(row[4]) == coded
            assert number(row[5]) == sum(opened.info(key).stored_bytes for key in opened.keys()) - coded
        assert number(row[9]) == pytest.approx(8 * stored / weights, abs=0.0051)
        assert number(row[10]) == pytest.approx(8 + entropy_bits / weights, abs=0.0051)
    for column in range(1, 7):
        assert number(found["all"][column]) == number(found["text"][column]) + number(found["vae"][column])


def test_proof_names_files_hashes_and_what_comes_back(models: Path):
    manifest, _ = report.find_manifest(models / "model-df11")
    page = render(manifest)
    head, text, vae = page.tables["Files and their hashes"]
    assert head[0] == "source file, SHA-256"
    source = models / "model" / "text" / "model.safetensors"
    assert text[0] == f"text/model.safetensors{sources.sha256(source)}"
    assert text[-1] == "the source, byte for byte"
    assert vae[-1] == "BF16: 1 of 2 tensors changed"
    commands, check = page.contents["pre"]
    assert "df11 restore --bf16 MODEL-df11 restored" in commands
    assert check.splitlines()[1:-1] == [f"{sources.sha256(source)}  text/model.safetensors"]
    df11.restore(models / "model-df11" / "text" / "model.df11", models / "restored.safetensors", force=True)
    assert sources.sha256(models / "restored.safetensors") in check


def test_all_tensors_are_listed(models: Path):
    manifest, _ = report.find_manifest(models / "model-df11")
    head, *rows = render(manifest).tables["All tensors"]
    assert [row[0] for row in rows] == [row.name for row in manifest.tensors]
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    with df11.open(models / "model-df11" / "vae" / "part.df11") as container:
        info = container.info("rounded")
        checksum = container.record("rounded").segments[0].decoded_checksum
    assert [found[name]["from F32"] for name in ("rounded", "exact", "ids")] == ["rounded", "exact", "-"]
    assert [found[name]["dtype"] for name in ("rounded", "exact", "ids")] == ["BF16", "BF16", "I64"]
    assert found["rounded"]["shape"] == "300x300"
    assert number(found["rounded"]["stored"]) == info.stored_bytes
    assert found["rounded"]["XXH3"] == f"{checksum:016x}"
    assert found["ids"]["exponent entropy"] == found["ids"]["bits per weight"].replace("64.00", "-") == "-"


def test_the_manifest_of_a_folder_is_read_if_it_has_one(models: Path, tmp_path: Path):
    manifest, _ = report.find_manifest(models / "model-df11")
    known = dataclasses.replace(manifest, origin=Origin("owner/name", "d" * 40, ""))
    (tmp_path / FILE_NAME).write_bytes(parquet.to_bytes(known))
    assert report.find_manifest(tmp_path) == (known, tmp_path.name)
    assert 'href="https://huggingface.co/owner/name/tree/' + "d" * 40 in report.render_report(known, "")


def test_one_container(models: Path):
    manifest, name = report.find_manifest(models / "model-df11" / "vae" / "part.df11")
    assert name == "part.df11"
    assert [file.file for file in manifest.files] == ["part.df11"]
    assert manifest.cast == "bf16"
    assert len(render(manifest).tables["Sizes by part"]) == 2


def test_files_are_written(models: Path, tmp_path: Path):
    out = tmp_path / "new" / "folder"
    written = report.write_report(models / "model-df11", out)
    assert [path.name for path in written] == [
        "report.html",
        "sizes.png",
        "layers.png",
        "exponents.png",
        "outliers.png",
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in written)
    before = sources.tree_bytes(out)
    assert Page(before["report.html"].decode()).contents["h1"] == ["model-df11"]
    report.write_report(str(models / "model-df11"), out)
    assert sources.tree_bytes(out) == before


# The page


@pytest.mark.parametrize("build", [made.model, made.evil, made.manifest], ids=["model", "evil", "empty"])
def test_page_loads_nothing_and_allows_only_its_own_script_and_style(build):
    text = report.render_report(build(), "title")
    page = Page(text)
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "style", "action", "poster", "data", "background"} & attributes.keys(), (
            tag,
            attributes,
        )
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            if target is not None:
                assert target.startswith("#") or (tag == "a" and target.startswith("https://huggingface.co/")), (
                    tag,
                    target,
                )
        assert tag not in (
            "link",
            "iframe",
            "img",
            "image",
            "base",
            "object",
            "embed",
            "foreignobject",
            "animate",
            "set",
        ), tag
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.attributes("id")}
    policies = [
        attributes["content"] or "" for tag, attributes in page.elements if tag == "meta" and "http-equiv" in attributes
    ]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        assert len(page.contents[kind]) == 1
        digest = base64.b64encode(hashlib.sha256(page.contents[kind][0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policies[0]


@pytest.mark.parametrize("build", [made.model, made.evil], ids=["model", "evil"])
def test_identifiers_are_unique_and_found(build):
    page = render(build())
    names = page.attributes("id")
    assert len(names) == len(set(names))
    for value in page.attributes("href"):
        assert not value.startswith("#") or value[1:] in names
    for value in [
        word for attribute in ("aria-labelledby",) for text in page.attributes(attribute) for word in text.split()
    ]:
        assert value in names
    pictures = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(pictures) == 4
    assert all(picture["role"] == "img" for picture in pictures)


def test_colours_are_variables():
    for plot in plots.plots(made.model()):
        text = plot.svg()
        assert not re.findall(r'"#[0-9a-fA-F]{6}"', text)
        assert set(re.findall(r"var\(--([a-z0-9]+)\)", text)) <= set(canvas.ROLES)
    style = render(made.model()).contents["style"][0]
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", style)) <= {*canvas.ROLES, "shade"}
    for role in canvas.ROLES:
        assert style.count(f"--{role}:") == 2  # light and dark
    assert "@LIGHT@" not in style


def test_few_colours_are_enough_for_pictures():
    """Colours that are used appear in the PNG, which has a palette."""
    for plot in plots.plots(made.model()):
        with Image.open(io.BytesIO(plot.png())) as image:
            pixels = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).astype(int)
        for role in set(re.findall(r"var\(--([a-z0-9]+)\)", plot.svg())) - {
            "grid"
        }:  # Its lines are thinner than a pixel.
            wanted = [int(canvas.LIGHT[role][index : index + 2], 16) for index in (1, 3, 5)]
            assert np.abs(pixels - wanted).max(axis=1).min() <= 4, (plot.name, role)


def luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [canvas.LIGHT, canvas.DARK], ids=["light", "dark"])
def test_contrast(palette):
    """WCAG: 4.5 for text and links, 3 for graphics."""
    for role, least in {"ink": 4.5, "muted": 4.5, "c1": 4.5, **{f"c{index}": 3 for index in range(2, 9)}}.items():
        bright, dark = sorted((luminance(palette[role]), luminance(palette["surface"])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= least, role


def test_strange_names_are_text():
    page = render(made.evil(), "<b>$title$</b>\u202e\n")
    assert page.contents["h1"] == ["<b>$title$</b>\\u202e"]
    listed = [row[0] for row in page.tables["All tensors"][1:]]
    for name in made.EVIL_NAMES:
        shown = errors.printable(name, None)
        assert (shown if len(shown) <= 200 else wording.fitted(name, 200)) in listed
    assert "\u202e" not in str(page.tables)
    assert any("$x$" in text for text in page.contents["text"])  # As it is, not as a formula.
    source = next(row for row in page.elements if row[0] == "dd")
    assert source is not None
    assert not [
        attributes for tag, attributes in page.elements if tag == "a" and "huggingface" in (attributes["href"] or "")
    ]  # No such repository.


@pytest.mark.parametrize("name", made.EVIL_NAMES)
def test_strange_names_are_drawn(name):
    """As a file, a stack, a kind of matrix, a matrix and an outlier. A warning from matplotlib would be an error."""
    rows = [made.tensor("a/b.df11", f"w{index}", (300, 300)) for index in range(9)] + [
        made.tensor("a/b.df11", name, (600, 600), bits=14.0)
    ]
    rows += [made.tensor(f"{name}.df11/c.df11", f"{name}.{layer}.{name}", (300, 300)) for layer in range(3)]
    manifest = made.manifest(*rows)
    assert len(plots.draw_plots(manifest)) == 4
    texts = render(manifest).contents["text"]
    assert f"1  {canvas.drawable(wording.fitted(name, 56))}  14.00".split() in [text.split() for text in texts]


def test_characters_that_the_font_lacks():
    assert canvas.drawable("重み.🤗.weight é") == "\ufffd\ufffd.\ufffd.weight é"


def test_same_manifest_same_bytes():
    first, second = made.model(), made.model()
    assert report.render_report(first, "t") == report.render_report(second, "t")
    assert plots.draw_plots(first) == plots.draw_plots(second)


def test_machine_settings_do_not_matter():
    import matplotlib

    before = plots.draw_plots(made.model())
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "path"}
    ):
        assert plots.draw_plots(made.model()) == before


@pytest.mark.parametrize("build", [made.model, made.evil], ids=["model", "evil"])
def test_pictures(build):
    drawn = plots.draw_plots(build())
    assert list(drawn) == [f"df11-plots/{name}.png" for name in plots.NAMES]
    for name, data in drawn.items():
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            pixels = np.asarray(image.convert("RGB"))
        assert image.width == 2 * canvas.WIDTH
        assert (pixels[0] == 255).all(), name  # White around it,
        share = (pixels != 255).any(axis=2).mean()
        assert 0.01 < share < 0.6, name  # and something in it.


def test_2000_tensors_fit():
    rows = [
        made.tensor(
            f"part/model-{index // 250:05}-of-00008.df11",
            f"model.layers.{index // 20}.{'n' * 280}.{index % 20}.weight",
            (256, 257),
        )
        for index in range(2000)
    ]
    text = report.render_report(made.manifest(*rows), "large")
    assert len(text.encode()) < 1_500_000
    assert len(Page(text).tables["All tensors"]) == 2001


def test_of_more_tensors_the_largest_are_listed(monkeypatch):
    monkeypatch.setattr(report, "MOST_TENSORS", 2)
    rows = [made.tensor("a.df11", f"t{size}", (size, 100)) for size in (10, 30, 20)]
    text = report.render_report(made.manifest(*rows), "t")
    assert [row[0] for row in Page(text).tables["All tensors"][1:]] == ["t30", "t20"]
    assert "The 2 largest of 3" in text


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([made.tensor("a.df11", "w", (300, 300))], ["sizes", "layers", "exponents", "outliers"]),
        ([made.tensor("a.df11", "w", (3,), bits=16)], ["sizes", "outliers"]),
        ([made.tensor("a.df11", "w", ())], ["sizes", "outliers"]),
        ([made.tensor("a.df11", "w", (30, 30), dtype="F32"), made.tensor("a.df11", "i", (3,), dtype="I64")], ["sizes"]),
        ([made.tensor("a.df11", "w", (0, 5))], ["sizes"]),
        ([made.tensor("a.df11", "z", (300, 300), center=5)], ["sizes", "layers", "exponents", "outliers"]),
    ],
    ids=["empty", "one matrix", "one vector", "one scalar", "no BF16", "an empty tensor", "tiny exponents"],
)
def test_little_to_show(rows, names):
    manifest = made.manifest(*rows)
    page = render(manifest)
    assert [attributes["aria-labelledby"].split("-")[0] for tag, attributes in page.elements if tag == "svg"] == names
    assert [plot.name for plot in plots.plan(manifest)] == names
    assert all(len(data) > 500 for data in plots.draw_plots(manifest).values())
    assert "nan" not in str(page.tables).lower().replace("infinite, nan", "")


def test_only_zeros():
    zeros = np.zeros(256, np.int64)
    zeros[0] = 90_000
    row = dataclasses.replace(
        made.tensor("a.df11", "w", (300, 300)), exponent_counts=ExponentCounts.of(zeros), exponent_entropy=0.0
    )
    page = render(made.manifest(row))
    assert page.tables["Exponents by part"][1][1:4] == ["100.0 %", "1", "-127 (100.0 %)"]
    assert page.tables["Exponents by part"][1][5:] == ["1", "0"]


def test_file_without_tensors():
    manifest = Manifest(Origin(), None, "df11 0.1.0", (made.file("a.df11", []),), ())
    assert render(manifest).tables["Sizes by part"][1][:7] == ["a.df11", "0", "500", "0", "0", "0", "1,000"]


# Figures


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.up.weight", summary.Position("model.layers", 12, "mlp.up")),
        ("blocks.0.experts.17.w.weight", summary.Position("blocks", 0, "experts.*.w")),
        ("3.weight", summary.Position("", 3, "weight")),
        ("model.embed.weight", None),
        ("layer1.weight", None),
        ("layers.7", None),
        ("", None),
        ("a.99999999999.b", None),
    ],
)
def test_position(name, place):
    assert summary.position(name) == place


def test_layers_by_kind():
    head, *rows = render(made.model()).tables["Bits per weight by kind of matrix"]
    assert head[1:] == ["matrices", "least", "mean", "most", "in layer", "entropy bound"]
    up = next(row for row in rows if row[0] == "text: model.layers.mlp.up")
    bits = [12.5 if layer == 3 else 10.7 + layer / 1000 for layer in range(12)]
    assert up[1:6] == ["12", f"{min(bits):.2f}", f"{sum(bits) / 12:.2f}", "12.50", "3"]
    bound = 8 + made.tensor("", "", (512, 512)).exponent_entropy
    assert up[6] == f"{bound:.2f}"
    outside = render(made.model()).tables["Other matrices"]
    assert [row[0] for row in outside[1:]] == ["model.embed", "conv"]


def test_outlier():
    manifest = made.model()
    found = summary.outliers(manifest)
    assert found.usual == pytest.approx(10.75, abs=0.05)
    assert [outlier.row.name for outlier in found.tensors] == ["model.layers.3.mlp.up.weight"]
    assert found.tensors[0].excess_bytes == pytest.approx((12.5 - found.usual) * 512 * 512 / 8, abs=1)
    row = render(manifest).tables["Outlier tensors"][1]
    assert row[:4] == ["1", "model.layers.3.mlp.up.weight", "262,144", "12.50"]
    assert number(row[5].replace("+", "")) == round(found.tensors[0].excess_bytes)


def test_small_and_usual_tensors_are_no_outliers():
    rows = [made.tensor("a.df11", f"w{index}", (300, 300), bits=10.7 + 0.02 * (index % 2)) for index in range(9)]
    rows += [
        made.tensor("a.df11", "small", (100, 100), bits=14.0),
        made.tensor("a.df11", "near", (300, 300), bits=10.9),
    ]
    assert summary.outliers(made.manifest(*rows)).tensors == []


def test_exponents_and_quartiles():
    first, second = (
        made.tensor("a/x.df11", "w", (300, 300), center=120),
        made.tensor("b/x.df11", "w", (400, 400), center=125),
    )
    rows = render(made.manifest(first, second)).tables["Exponents by part"][1:]
    assert [row[0] for row in rows] == ["a", "b", "all"]
    for row, center, elements in ((rows[0], 120, 90_000), (rows[1], 125, 160_000)):
        values = np.repeat(np.arange(256), made.counts_around(center, elements)) - 127
        expected = np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf")
        assert row[4] == " / ".join(str(int(value)) for value in expected)
        assert row[2] == "6"
    counts, weights = summary.exponents([first, second])
    assert weights == 250_000
    assert counts.sum() == 250_000


def test_parts():
    flat = made.manifest(*(made.tensor(f"model-{index:02}.df11", "w", (300, 300 + index)) for index in range(20)))
    parts = summary.parts(flat)
    assert len(parts) == summary.MOST_PARTS
    assert parts[-1][0].name == "9 others"
    assert sum(sizes.container_bytes for sizes, _ in parts) == sum(file.bytes for file in flat.files)
    mixed = made.manifest(made.tensor("x.df11", "w", (3, 3)), made.tensor("vae/x.df11", "w", (3, 3)))
    assert [sizes.name for sizes, _ in summary.parts(mixed)] == ["(top level)", "vae"]


def test_sizes_in_words():
    assert [wording.size(count) for count in (0, 1, 999, 1000, 45_430_528, 999_960_000, 15_611_000_000)] == [
        "0 bytes",
        "1 byte",
        "999 bytes",
        "1.00 kB",
        "45.43 MB",
        "1.00 GB",
        "15.61 GB",
    ]


def test_names_in_words():
    assert errors.printable("a\u202eb\nc\ud800\U000e0001", None) == "a\\u202eb\\nc\\ud800\\U000e0001"
    assert wording.fitted("model.layers.1.weight", 11) == "mod….weight"
    assert len(wording.fitted("x" * 300, 40)) == 40


def test_checksum_list_leaves_out_names_that_sha256sum_spells_otherwise():
    rows = [made.tensor(name, "w", (3, 3)) for name in ("fine name.df11", "new\nline.df11", "back\\slash.df11")]
    assert [line.split("  ")[1] for line in summary.checksum_list(made.manifest(*rows)).splitlines()] == [
        "fine name.safetensors"
    ]


# What cannot be


def test_missing_folder(tmp_path: Path):
    with pytest.raises(errors.MissingError, match="no such file"):
        report.write_report(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_without_containers(tmp_path: Path):
    with pytest.raises(errors.UsageError, match=r"no \.df11 file"):
        report.write_report(tmp_path, tmp_path / "out")


def test_damaged_manifest(tmp_path: Path):
    (tmp_path / FILE_NAME).write_bytes(b"PAR1 not a manifest PAR1")
    with pytest.raises(errors.ManifestError, match="manifest"):
        report.write_report(tmp_path, tmp_path / "out")


def test_damaged_container(models: Path, tmp_path: Path):
    data = bytearray((models / "model-df11" / "vae" / "part.df11").read_bytes())
    data[-5000] ^= 1
    (tmp_path / "x.df11").write_bytes(data)
    with pytest.raises(errors.ChecksumError):
        report.write_report(tmp_path, tmp_path / "out")


def test_target_that_is_a_file(models: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.Df11Error, match="file"):
        report.write_report(models / "model-df11", tmp_path / "file")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(errors.MissingExtraError, match=r"df11\[report\]"):
        report.render_report(made.model(), "t")
    assert [plot.name for plot in plots.plan(made.model())] == list(plots.NAMES)


def test_an_entropy_that_is_missing_gives_no_bound():
    row = dataclasses.replace(made.tensor("a.df11", "w", (30, 30)), exponent_entropy=None)
    assert summary.total(made.manifest(row)).entropy_bound is None
    assert render(made.manifest(row)).tables["Sizes by part"][1][10] == "-"
    assert math.isclose(
        summary.entropy_bound([made.tensor("a.df11", "w", (30, 30))]),
        8 + made.tensor("a.df11", "w", (30, 30)).exponent_entropy,
    )


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The committed docs/demo is made by this, and says that it is synthetic."""
    from benchmarks import demo_report

    assert demo_report.main(["--scale", "0.0005", "--out", str(tmp_path), "--dir", str(tmp_path)]) == 0
    names = ["report.html", *(f"{name}.png" for name in plots.NAMES), "card.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert "card.md" in capsys.readouterr().out
    assert Page((tmp_path / "report.html").read_text()).contents["h1"] == [
        "Synthetic stand-in of the shape of OmniGen2, scale 0.0005"
    ]
    card = (tmp_path / "card.md").read_text()
    assert "**These are not OmniGen2's weights.**" in card
    assert "load_pipeline(" in card
    assert re.findall(r"!\[[^\]]*\]\(([^)]*)\)", card) == [f"{name}.png" for name in plots.NAMES]


def test_sizes_by_dtype(tmp_path):
    """Every dtype of the source with its bytes there and here, and the bound where all of it is coded."""
    tensors = [
        sources.bf16("b", (300, 300)),
        sources.f32("narrowed", (300, 300), exact=True),
        sources.f32("f", (300, 300)),
        sources.Tensor("h", "F16", (90_000,), np.float16(np.random.default_rng(0).normal(size=90_000)).tobytes()),
        sources.random_tensor("i", "I32", (500,)),
    ]
    source = sources.write(tmp_path / "model" / "x.safetensors", tensors)
    df11.convert(source.parent, tmp_path / "out")
    manifest = parquet.read(tmp_path / "out" / FILE_NAME)
    found = {row.dtype: row for row in summary.by_dtype(manifest)}
    assert list(found) == ["F32", "F32, as BF16", "BF16", "F16", "I32"]
    for name, share, bits in (
        ("F32", 0.84, 26.55),
        ("F32, as BF16", 0.34, 10.55),
        ("BF16", 0.68, 10.55),
        ("F16", 0.87, 13.5),
    ):
        row = found[name]
        assert (row.tensors, row.elements) == (1, 90_000)
        assert share - 0.02 < row.ratio < share
        assert row.bound == pytest.approx(bits, abs=0.1)
        assert row.bound < row.bits_per_weight < row.bound + 0.25
    assert (found["I32"].ratio, found["I32"].bits_per_weight, found["I32"].bound) == (1, 32, None)
    assert "Sizes by dtype" in report.render_report(manifest, "model")
    assert "Sizes by dtype" not in report.render_report(made.manifest(made.tensor("a.df11", "w", (300, 300))), "model")
