from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import markdown_it
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from df11.converter.manifest import Manifest, Origin
from df11.formats import errors
from df11.formats.container import OriginalFile
from df11.pipelines import card, wording
from df11.pipelines.card import CardFields
from tests.support import manifests as made
from tests.support.hub import cards

SOURCE = """---
license: other
license_name: a licence
license_link: https://example.com/a licence)](x
pipeline_tag: text-generation
library_name: transformers
language: [en, no]
tags: [chat, safetensors, dfloat11]
datasets: [x/y]
---
# The source
"""


def render(
    manifest: Manifest | None = None,
    source: str | None = SOURCE,
    fields: CardFields = CardFields(),  # noqa: B008 - frozen
    **options: Any,
) -> str:
    manifest = manifest or made.model()
    options = {"repository": "me/name-df11", "plots": card.plot_paths(manifest), "configs": {}} | options
    return card.render_card(manifest, fields, source, **options)


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Front matter, parsed as YAML, and body; the Hub's rules find no fault."""
    assert cards.validate(text) == ([], [])
    start, front_matter, body = text.split("---\n", 2)
    assert start == ""
    data = yaml.safe_load(front_matter)
    assert ModelCard(text).data.to_dict() == data
    assert ModelCardData(**data).to_dict() == data
    return data, body


def tables(body: str) -> list[list[list[str]]]:
    """All tables, as a Markdown parser sees them: rows of cell texts."""
    tokens = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    found: list[list[list[str]]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open" or token.type == "tr_open":
            found[-1].append([]) if token.type == "tr_open" else None
        if before.type in ("td_open", "th_open"):
            assert token.type == "inline"
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "code_inline", "html_inline", "text_special"}, (kinds, token.content)
            html = [child.content for child in token.children if child.type == "html_inline"]
            assert set(html) <= {"<code>", "</code>"}, html
            found[-1][-1].append("".join(child.content for child in token.children if child.type != "html_inline"))
    return found


def number(text: str) -> float:
    value, unit = re.fullmatch(r"([0-9.,]+) ?(bytes|kB|MB|GB|%)?", text).groups()
    return float(value.replace(",", "")) * {None: 1, "%": 0.01, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_front_matter_is_carried_over():
    data, _ = parts(render())
    assert data == {
        "base_model": "owner/name",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "a licence",
        "license_link": "https://example.com/a licence)](x",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "language": ["en", "no"],
        "tags": ["df11", "lossless", "compression", "bfloat16", "chat"],
    }


def test_licence_is_linked():
    found = (
        "The source's model card names [a licence](https://example.com/a%20licence%29%5D%28x). The source is [owner/"
    )
    assert found in render()
    assert "[mine](LICENSE.md)." in render(
        fields=CardFields(license="other", license_name="mine", license_link="LICENSE.md")
    )
    assert "\n\nmine. The source is" in render(
        fields=CardFields(license="other", license_name="mine", license_link="//evil.example")
    )


def test_fields_come_first():
    fields = CardFields(
        license="mit",
        pipeline_tag="any-to-any",
        library_name="diffusers",
        tags=("mine", "df11"),
        language=("uk",),
        base_model="other/model",
        title="A | title",
    )
    data, body = parts(render(fields=fields))
    assert data == {
        "base_model": "other/model",
        "base_model_relation": "quantized",
        "license": "mit",  # Without the name and link of the source's licence.
        "pipeline_tag": "any-to-any",
        "library_name": "diffusers",
        "language": ["uk"],
        "tags": ["df11", "lossless", "compression", "bfloat16", "mine"],
    }
    assert body.strip().startswith("# A &#124; title\n")


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "# No front matter\n",
        "---\nlicense: [unclosed\n---\n# x\n",
        "---\n- a list\n---\n",
        "---\ndate: 2021-99-99\nlicense: mit\n---\n",
        "---\nlicense: !!python/object/apply:os.system [true]\n---\n",
        "---\n" + "a: " + "[" * 5000 + "\n---\n",
        "---\nlicense: mit\nno end\n",
        "---\nx: " + "y" * 70_000 + "\nlicense: mit\n---\n",
        "---\n? [a, b]\n: {c: d}\nlicense: mit\n? {e: f}\n: g\n---\n",
        "---\n\x00license: mit\n---\n",
    ],
)
def test_source_card_that_says_nothing(source):
    data, body = parts(render(source=source))
    assert data == {"base_model": "owner/name", "base_model_relation": "quantized", "tags": [*card.TAGS, "bfloat16"]}
    link = f"[owner/name](https://huggingface.co/owner/name/tree/{'c' * 40}/sub%20folder)"
    if source is None:
        assert f"The source has no model card here; see its repository, {link}" in body
    else:
        assert f"No licence was found in the model card of {link}" in body
    assert "names" not in body.split("## Licence")[1]


def test_front_matter_with_other_line_ends_and_a_mark():
    assert parts(render(source="\ufeff---\r\nlicense: mit\r\n---\r\n# x"))[0]["license"] == "mit"


@pytest.mark.parametrize("value", ["{a: b}", "[[a]]", "5", "null", "2024-01-01", "''", f"'{'x' * 600}'"])
def test_values_of_the_wrong_kind_are_left_out(value):
    lines = "".join(
        f"{key}: {value}\n" for key in ("license", "license_link", "pipeline_tag", "library_name", "language", "tags")
    )
    data, _ = parts(render(source=f"---\n{lines}---\n"))
    assert data == {"base_model": "owner/name", "base_model_relation": "quantized", "tags": [*card.TAGS, "bfloat16"]}


def test_norwegian_and_several_licences():
    data, body = parts(render(source="---\nlanguage: no\nlicense: [mit, apache-2.0]\n---\n"))
    assert data["language"] == ["no"]
    assert data["license"] == ["mit", "apache-2.0"]
    assert "The source's model card names mit, apache-2.0. The source is [owner/name]" in body


def test_strings_of_strangers_break_nothing():
    evil = 'x"\n---\nlicense: mit\n# | `a` <script> $y$ \u202e'
    source = (
        "---\n"
        + yaml.safe_dump(
            {"license": "other", "license_name": evil, "license_link": "javascript:alert(1)", "tags": [evil, "ok"]}
        )
        + "---\n"
    )
    text = render(made.evil(), source, CardFields(title=evil))
    data, body = parts(text)
    assert data["license_name"] == errors.printable(" ".join(evil.split()), None)
    assert "base_model" not in data  # It is no repository's name.
    assert "\u202e" not in text
    assert "<script>" not in body
    assert "javascript:" not in body
    assert "](javascript" not in body
    found = tables(body)
    assert {len(row) for row in found[0]} == {8}
    assert {len(row) for row in found[1]} == {4}
    for name in {file.source_file for file in made.evil().files}:
        assert any(row[0] == name for row in found[1]), name


@pytest.mark.parametrize("name", made.EVIL_NAMES)
def test_any_name_is_text_in_a_table(name):
    manifest = made.manifest(made.tensor(f"{name}.df11", "w", (300, 300)))
    found = tables(parts(render(manifest))[1])
    assert found[1][1][0] == wording.fitted(f"{name}.safetensors", 200)
    assert len(found[1][1]) == 4


def test_sizes_are_those_of_the_manifest():
    manifest = made.model()
    _, body = parts(render(manifest))
    head, *rows = tables(body)[0]
    assert head == ["part", "tensors", "source", "in BF16", "df11", "of BF16", "bits per weight", "entropy bound"]
    assert [row[0] for row in rows] == ["text", "vae", "all"]
    for row in rows:
        files = [file for file in manifest.files if row[0] == "all" or file.file.startswith(row[0])]
        own = [tensor for tensor in manifest.tensors if tensor.file in {file.file for file in files}]
        bf16 = [tensor for tensor in own if tensor.dtype == "BF16"]
        assert number(row[1]) == len(own)
        assert number(row[2]) == pytest.approx(sum(file.source_bytes for file in files), rel=0.006)
        in_bf16 = sum(2 * tensor.elements for tensor in bf16) + sum(
            tensor.stored_bytes for tensor in own if tensor.dtype != "BF16"
        )
        assert number(row[3]) == pytest.approx(in_bf16, rel=0.006)
        containers = sum(file.bytes for file in files)
        assert number(row[4]) == pytest.approx(containers, rel=0.006)
        assert number(row[5]) == pytest.approx(containers / in_bf16, abs=0.00051)
        assert number(row[6]) == pytest.approx(
            8 * sum(tensor.stored_bytes for tensor in bf16) / sum(tensor.elements for tensor in bf16), abs=0.0051
        )
    assert f"{sum(file.bytes for file in manifest.files) / 1e6:.2f} MB" in body.split("##")[0]


def test_source_is_linked_at_its_commit():
    _, body = parts(render())
    assert f"[owner/name](https://huggingface.co/owner/name/tree/{'c' * 40}/sub%20folder)" in body


def test_pictures():
    _, body = parts(render())
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", body) == [
        f"df11-plots/{name}.png" for name in ("sizes", "layers", "exponents", "outliers")
    ]
    assert "![" not in render(plots={})
    assert "![Sizes against BF16](a%20b%28.png)" in render(plots={"sizes": "a b(.png"})
    assert list(card.plot_paths(made.manifest())) == []


# How it is restored


def test_changed_values_are_said():
    _, body = parts(render())
    assert "The source has 2 tensors in F32, rounded to BF16 the way torch does it. In 1 of them this **ch" in body
    assert "this **changed values**.\n" in body
    assert "in 1 of 2 files. **Their F32 originals cannot be restored from here**" in body
    assert "$ df11 restore --bf16 name-df11 restored" in body
    dtypes, proofs = tables(body)[1:3]
    assert [row[0] for row in dtypes] == ["dtype of the source", "BF16", "F32, as BF16", "I64"]
    rows = proofs[1:]
    manifest = made.model()
    assert [row[0] for row in rows] == ["text/model.safetensors", "vae/part.safetensors"]
    assert [row[2] for row in rows] == [file.source_sha256 for file in manifest.files]
    assert [row[3] for row in rows] == ["byte for byte", "as BF16; 1 of 2 tensors changed"]


@pytest.mark.parametrize("exact", [None, True])
def test_unchanged_values(exact):
    manifest = made.manifest(made.tensor("a.df11", "w", (300, 300), exact=exact), cast=exact is not None)
    _, body = parts(render(manifest))
    assert "Every source file is restored byte for byte" in body
    assert "--bf16" not in body
    assert "**changed" not in body
    assert ("No value changed" in body) == (exact is True)
    assert "$ df11 hub pull hf://me/name-df11 name-df11\n$ df11 restore name-df11 restored\n" in body


def test_an_imported_model_says_what_it_was_decoded_from():
    files = (OriginalFile("a_0.safetensors", 1234, "a" * 64), OriginalFile("b.safetensors", 99, "b" * 64))
    manifest = made.model()
    rows = tuple(dataclasses.replace(row, made_from=files) for row in manifest.files)
    _, body = parts(render(dataclasses.replace(manifest, files=rows)))
    assert "a checkpoint in DFloat11's layout: 2 files" in body
    assert [["a_0.safetensors", "1,234", "a" * 64], ["b.safetensors", "99", "b" * 64]] in [
        rows[1:] for rows in tables(body)
    ]
    assert "Every source file is restored byte for byte" not in body
    assert "DFloat11" not in parts(render(manifest))[1]


def test_in_a_folder_nothing_is_pulled():
    text = render(repository=None)
    assert "hf://" not in text
    assert "df11 hub pull" not in text
    assert "df11 restore --bf16 name-df11 restored" in text


# How it is loaded


def code(text: str) -> str:
    """All Python code blocks; each of them compiles."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        compile(block, "card", "exec")
    return "\n".join(blocks)


def configs(**content: Any) -> dict[str, str]:
    return {f"{name}.json": json.dumps(value) for name, value in content.items()}


def test_omnigen2():
    found = code(render(configs=configs(model_index={"_class_name": "OmniGen2Pipeline"})))
    assert 'omnigen2.load_pipeline("me/name-df11", "cuda", classes="OmniGen2")' in found


@pytest.mark.parametrize(
    ("content", "library", "line"),
    [
        (
            {"model_index": {"_class_name": "FluxPipeline"}},
            None,
            'pipeline = DiffusionPipeline.from_pretrained("me/name-df11", torch_dtype=torch.bfloat16)',
        ),
        (
            {"config": {"_class_name": "FluxTransformer2DModel"}},
            "diffusers",
            'model = FluxTransformer2DModel.from_pretrained("me/name-df11", torch_dtype=',
        ),
        (
            {"config": {"architectures": ["Qwen3ForCausalLM"]}},
            None,
            'model = AutoModelForCausalLM.from_pretrained("me/name-df11", dtype=torch.bfloat16,',
        ),
        (
            {"config": {"architectures": ["BertModel"]}},
            None,
            'model = BertModel.from_pretrained("me/name-df11", dtype=torch.bfloat16, device_map="cuda")',
        ),
        ({"config": {"architectures": ['x"; import os']}}, None, "model = AutoModel.from_pretrained("),
        ({"config": {"architectures": [5]}}, None, "model = AutoModel.from_pretrained("),
        ({}, "transformers", "model = AutoModel.from_pretrained("),
        ({}, None, 'runtime.load_model(model, "hf://me/name-df11", device="cuda")'),
        ({"config": ["no", "table"]}, None, 'runtime.load_model(model, "hf://me/name-df11", device="cuda")'),
    ],
)
def test_loading(content, library, line):
    found = code(render(source=None, fields=CardFields(library_name=library), configs=configs(**content)))
    assert line in found
    assert "runtime.load_model(" in found
    assert ("import df11.runtime" in found) == ("from_pretrained" in found)
    assert found.count("from_pretrained(") <= 1


@pytest.mark.parametrize(
    ("dtypes", "name"),
    [
        (["BF16", "F32"], "bfloat16"),
        (["F16", "F16", "BF16"], "float16"),
        (["F32", "I64", "F32", "BF16"], "float32"),
        (["F8_E4M3", "F8_E4M3", "F16"], "float16"),
        (["F8_E4M3"], "bfloat16"),
    ],
)
def test_a_model_is_loaded_in_the_dtype_of_its_weights(dtypes, name):
    """So that they stay compressed, and nothing is rounded."""
    row = made.tensor("a.df11", "w", (300, 300))
    rows = [dataclasses.replace(row, name=str(number), dtype=dtype) for number, dtype in enumerate(dtypes)]
    text = render(made.manifest(*rows), configs=configs(config={"architectures": ["Qwen3ForCausalLM"]}))
    assert re.findall(r"torch\.b?float\d+", code(text)) == [f"torch.{name}"] * 2
    assert name in parts(text)[0]["tags"]


@pytest.mark.parametrize("text", ["", "{", "[" * 5000, '"x"'])
def test_configs_that_cannot_be_read(text):
    assert "from_pretrained" not in render(source=None, configs={"config.json": text, "model_index.json": text})


# Speed


def results(**changes: Any) -> dict[str, Any]:
    rows = [
        {
            "what": "50 steps | 4096 tokens",
            "name": "BF16",
            "seconds": 20.0,
            "of_bf16": 1.0,
            "held_bytes": 8_000_000_000,
            "peak_bytes": 12_000_000_000,
        },
        {
            "what": "50 steps | 4096 tokens",
            "name": "df11",
            "seconds": 20.5,
            "of_bf16": 1.025,
            "held_bytes": 5_300_000_000,
            "peak_bytes": 9_400_000_000,
        },
    ]
    gpu = {"name": "NVIDIA <H100> | 80GB", "memory_bytes": 85_000_000_000}
    return {
        "machine": {"date": "2026-11-30T10:00:00+00:00", "gpu": gpu},
        "sections": {"image": {"about": "x", "rows": rows}},
    } | changes


def save(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_speed_only_with_results(tmp_path: Path):
    assert "## Speed" not in render()
    _, body = parts(render(fields=CardFields(results=save(tmp_path / "r.json", results()))))
    head, bf16, coded = next(table for table in tables(body) if "device" in table[0])
    assert head == ["what", "by", "time", "of BF16's time", "model, GB", "peak, GB", "device", "date"]
    assert bf16 == [
        "50 steps | 4096 tokens",
        "BF16",
        "20.00 s",
        "1.000",
        "8.00",
        "12.00",
        "NVIDIA <H100> | 80GB",
        "2026-11-30",
    ]
    assert coded == [
        "50 steps | 4096 tokens",
        "df11",
        "20.50 s",
        "1.025",
        "5.30",
        "9.40",
        "NVIDIA <H100> | 80GB",
        "2026-11-30",
    ]


def test_rows_as_the_benchmarks_write_them(tmp_path: Path):
    from benchmarks.gpu import bench
    from benchmarks.gpu.timing import Timing

    row = bench.Bench._row("1,048,576 weights", "df11", Timing.of([5e-6, 6e-6, 7e-6]), 2 << 20) | {
        "of_floor": 0.9,
        "times_dfloat11": None,
    }
    content = results(sections={"sizes": {"about": "x", "rows": [row]}, "tiles": {"rows": "not looked at"}})
    _, body = parts(render(fields=CardFields(results=save(tmp_path / "r.json", content))))
    head, only = next(table for table in tables(body) if "device" in table[0])
    assert dict(zip(head, only, strict=True))["time"] == "6.0 µs"
    assert dict(zip(head, only, strict=True))["of a plain copy's speed"] == "0.900"


def test_programs_that_write_results_have_these_sections():
    from benchmarks.gpu import bench, models
    from df11.pipelines import results as reader

    assert set(reader.SECTIONS) <= {*bench.SECTIONS, *models.SECTIONS}
    assert set(reader._COLUMNS) <= {*bench._COLUMNS, *models._COLUMNS}


ROW = results()["sections"]["image"]["rows"][0]


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[" * 5000,
        "[]",
        "{}",
        {"machine": {}, "sections": {}},
        results(sections={}),
        results(sections={"tiles": {"rows": []}}),
        results(sections={"image": {"rows": []}}),
        results(sections={"image": {"rows": [{"what": "x", "name": "y"}]}}),
        results(sections={"image": {"rows": [ROW | {"seconds": "fast"}]}}),
        results(sections={"image": {"rows": [ROW | {"seconds": -1}]}}),
        results(sections={"image": {"rows": [ROW | {"seconds": 10**400}]}}),
        results(sections={"image": {"rows": [ROW | {"peak_bytes": True}]}}),
        results(sections={"image": {"rows": [ROW] * 201}}),
        results(sections={"image": {"rows": "x"}}),
        results(machine={"date": "2026-11-30", "gpu": {"name": "none, the processor"}}),
        results(machine={"date": 5, "gpu": {"name": "x", "memory_bytes": 1}}),
        results(machine={"date": "2026-11-30", "gpu": "x"}),
    ],
)
def test_other_files_are_no_results(tmp_path: Path, content):
    with pytest.raises(errors.UsageError, match="not a results file"):
        render(fields=CardFields(results=save(tmp_path / "r.json", content)))


def test_results_that_are_missing(tmp_path: Path):
    with pytest.raises(errors.MissingError):
        render(fields=CardFields(results=str(tmp_path / "none.json")))


# The rest


def test_notes_are_kept_as_they_are():
    assert "\n\nSee **this**.\n\n* a\n\n## Sizes" in render(fields=CardFields(notes="See **this**.\n\n* a\n"))


def test_same_arguments_same_card():
    assert render() == render()


def test_nothing_in_it():
    data, body = parts(render(made.manifest(), None, repository=None))
    assert data == {"tags": [*card.TAGS, "bfloat16"]}
    assert "in 0 bytes" in body


def test_local_source_and_no_bf16():
    manifest = made.manifest(made.tensor("a.df11", "w", (30, 30), dtype="F32"))
    data, body = parts(render(manifest, None, CardFields(base_model="owner/name")))
    assert data["base_model"] == "owner/name"
    assert "The weights of a local source, stored by df11 0.1.0" in body
    assert "of their size in BF16" not in body


def test_repository_with_a_strange_commit():
    manifest = dataclasses.replace(made.model(), origin=Origin("owner/name", "a)b`|c/../..", ""))
    _, body = parts(render(manifest))
    assert "(https://huggingface.co/owner/name/tree/a%29b%60%7Cc%2F..%2F..)" in body


@pytest.mark.parametrize("name", ["name", "a/b/c", "owner/name\n", "../x", "owner/na me", "https://huggingface.co/a/b"])
def test_base_model_must_be_a_repository(name):
    with pytest.raises(errors.UsageError, match="base_model"):
        render(fields=CardFields(base_model=name))


def test_other_licence_needs_a_name():
    with pytest.raises(errors.UsageError, match="license_name"):
        render(fields=CardFields(license="other"))
    assert parts(render(fields=CardFields(license="other", license_name="mine")))[0]["license_name"] == "mine"


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.MissingExtraError, match=r"df11\[hub\]"):
        render()
