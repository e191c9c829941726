"""The model card of a converted model: README.md of the target repository, with measured figures only.

Strings from the source's card and from the manifest are untrusted: they break neither the YAML nor the tables.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from df11.formats import errors
from df11.formats.hub import is_repository
from df11.pipelines import plots, summary, wording
from df11.pipelines.results import read_results

if TYPE_CHECKING:
    from df11.converter.manifest import Manifest

CONFIGS: Final = ("model_index.json", "config.json")
"""Files of a tree that tell how it is loaded."""
TAGS: Final = ("df11", "lossless", "compression", "bfloat16")
"""Not ``dfloat11``: those who look for that tag want files that the dfloat11 package loads, and these it does not."""
_NOT_CARRIED: Final = frozenset(
    {"safetensors", "gguf", "onnx", "endpoints_compatible", "text-generation-inference", "dfloat11"}
)
"""Tags of a source that are about its files, and are not true of these."""
_LONGEST_FRONT_MATTER: Final = 64 << 10
_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,80}")


@dataclass(frozen=True, slots=True)
class CardFields:
    """What a job file says of a card; what it does not say is carried over from the source's card."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    pipeline_tag: str | None = None
    library_name: str | None = None
    tags: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    base_model: str | None = None
    """``owner/name``; by default the source's repository."""
    title: str | None = None
    notes: str | None = None
    """Markdown, put below the first lines as it is."""
    results: str | None = None
    """Path of a results file, see :mod:`df11.pipelines.results`."""


def plot_paths(manifest: Manifest) -> dict[str, str]:
    """The pictures that there are for a manifest: name of the plot and its path in the repository. Draws nothing."""
    return {plot.name: plots.path(plot.name) for plot in plots.plan(manifest)}


def render_card(
    manifest: Manifest,
    fields: CardFields,
    source_card: str | None,
    *,
    repository: str | None,
    plots: Mapping[str, str],
    configs: Mapping[str, str],
) -> str:
    """The card. The same arguments give the same text.

    ``source_card``: README.md of the source; None, or one without readable front matter, gives nothing to carry over. ``repository``: the target,
    ``owner/name``; None for a folder. ``plots``: paths of pictures, relative to the card, by the names that :func:`plot_paths` gives them.
    ``configs``: text of those CONFIGS that the tree has. Raises UsageError for fields that cannot be. Needs huggingface_hub.
    """
    try:
        from huggingface_hub import ModelCardData
    except ModuleNotFoundError:
        raise errors.missing_extra("huggingface_hub", "hub") from None
    carried = _front_matter(source_card)
    base = fields.base_model or manifest.origin.repository
    if fields.base_model is not None and not is_repository(fields.base_model):
        raise errors.UsageError(
            "base_model of the card", expected="owner/name", found=errors.shortened(fields.base_model)
        )
    if base is not None and not is_repository(base):
        base = None
    data: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized" if base else None}
    for key in ("license", "license_name", "license_link", "pipeline_tag", "library_name"):
        data[key] = _line(getattr(fields, key)) or _line(carried.get(key))
    if fields.license is not None:  # Another licence, to which the name and the link of the source's do not belong.
        data |= {"license_name": _line(fields.license_name), "license_link": _line(fields.license_link)}
    data["license"] = data["license"] or _lines(carried.get("license")) or None  # Some have several.
    if data["license"] == "other" and data["license_name"] is None:
        raise errors.UsageError(
            "the card's license is other, and it has no license_name", hint="the Hub wants one: add it to [model.card]"
        )
    data["language"] = _lines(fields.language) or _lines(carried.get("language")) or None
    data["tags"] = list(
        dict.fromkeys(
            [*TAGS, *(_lines(fields.tags) or [tag for tag in _lines(carried.get("tags")) if tag not in _NOT_CARRIED])]
        )
    )
    front_matter = ModelCardData(**{key: value for key, value in data.items() if value is not None}).to_yaml()
    name = base or manifest.origin.repository or "model"
    title = _line(fields.title) or (repository.split("/")[-1] if repository else f"{name.split('/')[-1]} in df11")
    sections = [
        f"# {_escaped(title)}",
        _introduction(manifest),
        (fields.notes or "").strip(),
        "## Sizes",
        _sizes(manifest),
        "\n\n".join(f"![{plot_title}]({quote(plots[name])})" for name, plot_title in _TITLES.items() if name in plots),
        _speed(fields.results) if fields.results is not None else "",
        "## Load",
        _loading(manifest, repository, data["library_name"], configs),
        "## Restore the original",
        _restoring(manifest, repository),
        "## Licence",
        _licence(manifest, data),
    ]
    return f"---\n{front_matter}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


_TITLES: Final = {
    "sizes": "Sizes against BF16",
    "layers": "Bits a weight by layer",
    "exponents": "Share of the weights that have an exponent",
    "outliers": "Bits a weight of each tensor against its size",
}


# Front matter


def _front_matter(card: str | None) -> dict[str, Any]:
    # Of a stranger's card: a broken one says nothing.
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    yaml: Any = importlib.import_module("yaml")  # The client needs it, too.
    match = REGEX_YAML_BLOCK.search((card or "").removeprefix("\ufeff"))
    if match is None or len(match[2]) > _LONGEST_FRONT_MATTER:
        return {}
    try:
        # Without merges (<<), of which a few lines can make more entries than there is memory.
        found = yaml.load(
            match[2], type("Loader", (yaml.SafeLoader,), {"flatten_mapping": lambda _loader, _node: None})
        )
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
        TypeError,
        AttributeError,
        KeyError,
    ):  # Of dates and numbers, too.
        return {}
    return found if isinstance(found, dict) else {}


def _line(value: object) -> str | None:
    """A string on one line, all of it visible; None for anything else."""
    if value is False:
        return "no"  # Norwegian, to YAML.
    if not isinstance(value, str) or len(value) > 500:
        return None
    return wording.visible(" ".join(value.split())) or None


def _lines(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [line for line in map(_line, values[:200]) if line is not None]


# Markdown


_PLAIN: Final = frozenset(" ,;-/()%+.")


def _escaped(text: str) -> str:
    """Text that Markdown takes as it is, in a table, too: no marks, no links, no line ends."""
    marked = "".join(
        f"&#{ord(character)};"
        if character.isascii() and not character.isalnum() and character not in _PLAIN
        else character
        for character in wording.visible(text)
    )
    return re.sub(r"(?i)(www)\.", r"\1&#46;", marked)


def _code(name: str) -> str:
    """A name as code; in HTML if it holds what would end the code or the cell."""
    return (
        f"`{name}`"
        if re.fullmatch(r"[A-Za-z0-9_./+-]{1,200}", name)
        else f"<code>{_escaped(wording.fitted(name, 200))}</code>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a head that begins with ``#`` is that of a column of numbers."""
    marks = ["---:" if head.startswith("#") else "---" for head in heads]
    lines = [[head.removeprefix("#") for head in heads], marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


# Sections


def _source_link(manifest: Manifest) -> str:
    origin = manifest.origin
    if origin.repository is None:
        return "a local source"
    page = wording.hub_page(origin.repository, origin.commit, origin.path)
    at = f" at commit {_code(origin.commit[:12])}" if origin.commit else ""
    return f"{_code(origin.repository)}{at}" if page is None else f"[{_escaped(origin.repository)}]({page}){at}"


def _introduction(manifest: Manifest) -> str:
    total = summary.total(manifest)
    text = f"The weights of {_source_link(manifest)}, stored by {_escaped(manifest.tool)} in {wording.size(total.container_bytes)}"
    if total.weights:
        text += f", {wording.percent(total.ratio)} of their size in BF16"
    text += (
        ".\nThe exponents of BF16 weights are Huffman coded, signs and mantissas stay as they are: every weight decodes to the same bits as in BF16, "
        "and stays compressed in memory while the model runs."
    )
    if total.cast:
        effect = (
            f"In {total.changed:,} of them this **has changed values**."
            if total.changed
            else "No value has changed: all were BF16 numbers already."
        )
        text += f"\n\nThe source has {wording.count(total.cast, 'tensor')} in F32, rounded to BF16 for this as torch rounds. {effect}"
    return text


def _sizes(manifest: Manifest) -> str:
    parts = [sizes for sizes, _ in summary.parts(manifest)]
    rows = [*parts, summary.total(manifest)] if len(parts) > 1 else parts
    source = "#source, in F32" if all(row.cast == row.tensors for row in rows) else "#source"
    heads = ["part", "#tensors", source, "#in BF16", "#df11", "#of BF16", "#bits a weight", "#floor"]
    cells = [
        [
            _code(row.name) if index < len(parts) else "all",
            f"{row.tensors:,}",
            wording.size(row.source_bytes),
            wording.size(row.bf16_bytes),
            wording.size(row.container_bytes),
            wording.percent(row.ratio),
            wording.bits(row.bits_per_weight),
            wording.bits(row.floor_bits),
        ]
        for index, row in enumerate(rows)
    ]
    return _table(heads, cells) + (
        "\n\nMeasured. Source and df11: whole files, everything counted. In BF16: the tensors alone. Bits a weight: of the tensors that decode "
        "to BF16. Floor: the entropy of their exponents, and 8 bits for sign and mantissa. `df11-manifest.parquet` has a row for each tensor."
    )


def _speed(path: str) -> str:
    found = read_results(path)
    rows = [
        ["-" if cell is None else _escaped(cell) for cell in (*row, found.device, found.date)] for row in found.rows
    ]
    heads = ["what", "by", *(f"#{column}" for column in found.columns[2:]), "device", "date"]
    return "## Speed\n\n" + _table(heads, rows)


def _loading(manifest: Manifest, repository: str | None, library: str | None, configs: Mapping[str, str]) -> str:
    place = repository or wording.folder_name(manifest.origin.repository)
    index, config = (_json(configs.get(name)) for name in CONFIGS)
    pipeline, model, architectures = index.get("_class_name"), config.get("_class_name"), config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    parts = []
    if pipeline == "OmniGen2Pipeline":
        parts = [
            "OmniGen2's classes come from a checkout of [its repository](https://github.com/VectorSpaceLab/OmniGen2), here in the folder `OmniGen2`.",
            _block(
                "console",
                "$ pip install 'df11[hub,cuda12]' transformers diffusers accelerate peft einops torchvision pillow python-dotenv",
            ),
            _block(
                "python",
                "from df11.runtime import omnigen2",
                "",
                f'pipeline = omnigen2.load_pipeline("{place}", "cuda", classes="OmniGen2")  # or "cpu"',
                'pipeline("A fox in the snow", num_inference_steps=50).images[0].save("fox.png")',
            ),
        ]
    elif index or library == "diffusers":
        name, variable = ("DiffusionPipeline", "pipeline") if index else (_class(model, "AutoModel"), "model")
        parts = [
            _block("console", "$ pip install 'df11[hub,cuda12]' diffusers transformers accelerate"),
            _block(
                "python",
                "import torch",
                "import df11.runtime  # from here on, from_pretrained loads df11",
                f"from diffusers import {name}",
                "",
                f'{variable} = {name}.from_pretrained("{place}", torch_dtype=torch.bfloat16).to("cuda")  # or "cpu"',
            ),
        ]
    elif architecture or library == "transformers":
        causal = isinstance(architecture, str) and architecture.endswith("ForCausalLM")
        name = "AutoModelForCausalLM" if causal else _class(architecture, "AutoModel")
        parts = [
            _block("console", "$ pip install 'df11[hub,cuda12]' 'transformers>=5.20' accelerate"),
            _block(
                "python",
                "import torch",
                "import df11.runtime  # from here on, from_pretrained loads df11",
                f"from transformers import {name}",
                "",
                f'model = {name}.from_pretrained("{place}", dtype=torch.bfloat16, device_map="cuda")  # or "cpu"',
            ),
        ]
    path = f"hf://{repository}" if repository else place
    parts += [
        ("Any other" if parts else "A")
        + " torch model, by the names of its tensors (`pip install 'df11[hub,cuda12]'`, or `df11[hub,torch]` for the processor alone):",
        _block(
            "python",
            "import torch",
            "from df11 import runtime",
            "",
            'with torch.device("meta"):',
            "    model = MyModel().to(torch.bfloat16)",
            f'runtime.load_model(model, "{path}", device="cuda")  # or a folder or file in it; or "cpu"',
        ),
    ]
    return "\n\n".join(parts)


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _class(name: object, otherwise: str) -> str:
    return name if isinstance(name, str) and _IDENTIFIER.fullmatch(name) else otherwise


def _restoring(manifest: Manifest, repository: str | None) -> str:
    proofs = summary.proofs(manifest)
    changed = [proof for proof in proofs if not proof.exact]
    folder = repository.split("/")[1] if repository else wording.folder_name(manifest.origin.repository)
    commands = [
        *([f"$ df11 hub pull hf://{repository} {folder}"] if repository else []),
        f"$ df11 restore {'--bf16 ' if changed else ''}{folder} restored",
        "$ (cd restored && find . -name '*.safetensors' -exec sha256sum {} +)",
    ]
    if not changed:
        words = "Every source file comes back byte for byte, or not at all: its SHA-256 is compared before it takes its name."
    else:
        words = (
            f"The cast from F32 to BF16 has changed values in {len(changed):,} of {wording.count(len(proofs), 'file')}. **Their F32 originals cannot "
            "be restored from here**; `--bf16` writes them as BF16 files, which hold the weights of this model bit for bit. The F32 files are those "
            f"of {_source_link(manifest)}."
        )
        if len(changed) < len(proofs):
            words += " All others come back byte for byte, and their SHA-256 is compared before they take their names."
    rows = [
        [
            _code(proof.file.source_file),
            f"{proof.file.source_bytes:,}",
            _code(proof.file.source_sha256),
            "byte for byte"
            if proof.exact
            else f"as BF16; {proof.changed:,} of {wording.count(proof.cast, 'tensor')} changed",
        ]
        for proof in proofs
    ]
    return "\n\n".join(
        [
            words,
            _block("console", *commands),
            _table(["source file", "#bytes", "SHA-256 of the source", "restored"], rows),
        ]
    )


def _licence(manifest: Manifest, data: Mapping[str, Any]) -> str:
    source = "a local file or folder" if manifest.origin.repository is None else _source_link(manifest)
    if data["license"] is None:
        return f"The source, {source}, names no licence in its card; its terms hold for these files, too."
    terms = data["license_name"] or data["license"]
    name = _escaped(terms if isinstance(terms, str) else ", ".join(terms))
    link = data["license_link"]
    if link is not None and (re.match(r"https?://", link) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", link)):
        name = f"[{name}]({quote(link, safe=':/?&=#%~+,.@-_')})"
    return f"{name}. The source is {source}."
