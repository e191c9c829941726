"""The model card of a converted model: README.md of the target repository, with measured figures only.

This module computes the values, ``templates/card.md.j2`` holds the text. Strings from the source's model card and from
the manifest are untrusted: they break neither the YAML nor the tables.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from df11.formats import errors, json_text
from df11.pipelines import plots, rendering, summary, wording
from df11.pipelines.results import read_results
from df11.storage.address import is_repository
from df11.storage.client import library

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

    from df11.converter.manifest import Manifest

CONFIGS: Final = ("model_index.json", "config.json")
"""Files of a model folder that say how to load it."""
TAGS: Final = ("df11", "lossless", "compression")
"""Besides the dtype. Not ``dfloat11``: that is for files that the dfloat11 package can load, which these are not."""
_NOT_CARRIED: Final = frozenset(
    {"safetensors", "gguf", "onnx", "endpoints_compatible", "text-generation-inference", "dfloat11"}
)
"""Tags that describe the files of a source and are wrong for these."""
_LONGEST_FRONT_MATTER: Final = 64 << 10
_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,80}")


@dataclass(frozen=True, slots=True)
class CardFields:
    """What a job file says about the model card. The rest is carried over from the source's model card."""

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
    """Markdown, inserted unchanged below the introduction."""
    results: str | None = None
    """Path of a results file, see :mod:`df11.pipelines.results`."""


def plot_paths(manifest: Manifest) -> dict[str, str]:
    """The pictures for a manifest: plot name -> path in the repository. Draws nothing."""
    return {plot.name: plots.path(plot.name) for plot in plots.plan(manifest)}


_TITLES: Final = {
    "sizes": "Sizes against BF16",
    "layers": "Bits per weight by layer",
    "exponents": "Share of the weights that have an exponent",
    "outliers": "Bits per weight of each tensor against its size",
}


def render_card(
    manifest: Manifest,
    fields: CardFields,
    source_card: str | None,
    *,
    repository: str | None,
    plots: Mapping[str, str],
    configs: Mapping[str, str],
) -> str:
    """The text of :func:`model_card`. The same arguments give the same text."""
    return str(model_card(manifest, fields, source_card, repository=repository, plots=plots, configs=configs))


def model_card(
    manifest: Manifest,
    fields: CardFields,
    source_card: str | None,
    *,
    repository: str | None,
    plots: Mapping[str, str],
    configs: Mapping[str, str],
) -> ModelCard:
    """The model card. Its ``validate()`` asks the Hub whether the front matter is acceptable.

    Before version 2.2 of the client it always asks huggingface.co, whatever ``HF_ENDPOINT`` says.

    ``source_card``: README.md of the source, whose front matter is carried over. Without one it is None, and the model
    card then says so instead of naming a licence. ``repository``: the target, ``owner/name``; None for a folder.
    ``plots``: paths of pictures, relative to the model card, by the names that :func:`plot_paths` gives them.
    ``configs``: text of the CONFIGS that the model folder has. Raises UsageError for invalid fields. Needs
    huggingface_hub and jinja2.
    """
    hub = library()
    template = rendering.markdown_environment().get_template("card.md.j2")
    from markupsafe import Markup

    origin, total = manifest.origin, summary.total(manifest)
    base = _base_model(manifest, fields)
    dtype = summary.torch_dtype(manifest)
    data = _data(base, fields, source_card, dtype)
    name = base or origin.repository or "model"
    title = repository.split("/")[-1] if repository else f"{name.split('/')[-1]} in df11"
    parts = [sizes for sizes, _ in summary.parts(manifest)]
    sizes = [*parts, total] if len(parts) > 1 else parts
    proofs = summary.proofs(manifest)
    imported = list(dict.fromkeys(original for file in manifest.files for original in file.made_from))
    folder = wording.folder_name(origin.repository)
    place = repository or folder
    loader, class_name, variable = _loader(data.library_name, configs)
    body = template.render(
        title=_line(fields.title) or title,
        origin=origin,
        source_page=wording.hub_page(origin.repository, origin.commit, origin.path),
        tool=manifest.tool,
        total=total,
        imported=imported,
        imported_bytes=sum(file.bytes for file in imported),
        notes=Markup((fields.notes or "").strip()),  # noqa: S704 - the user's own Markdown
        sizes=sizes,
        dtypes=summary.by_dtype(manifest),
        torch_dtype=dtype,
        all_cast=all(row.cast == row.tensors for row in sizes),
        plots=[{"title": title, "path": plots[plot]} for plot, title in _TITLES.items() if plot in plots],
        speed=None if fields.results is None else read_results(fields.results),
        loader=loader,
        class_name=class_name,
        variable=variable,
        repository=repository,
        place=place,
        folder=place.split("/")[-1],
        proofs=proofs,
        changed=[proof for proof in proofs if not proof.exact],
        licence=_licence(data),
        licence_link=_followed(data.license_link),
        licence_is_given=bool(fields.license or fields.license_name),
        card_was_read=source_card is not None,
    )
    card: ModelCard = hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return card


def _base_model(manifest: Manifest, fields: CardFields) -> str | None:
    if fields.base_model is not None and not is_repository(fields.base_model):
        raise errors.UsageError(
            "base_model of the model card", expected="owner/name", found=errors.shortened(fields.base_model)
        )
    base = fields.base_model or manifest.origin.repository
    return base if base is not None and is_repository(base) else None


def _data(base: str | None, fields: CardFields, source_card: str | None, dtype: str) -> ModelCardData:
    from huggingface_hub import ModelCardData

    carried = _front_matter(source_card)
    data: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized" if base else None}
    for key in ("license", "license_name", "license_link", "pipeline_tag", "library_name"):
        data[key] = _line(getattr(fields, key)) or _line(carried.get(key))
    if fields.license is not None:  # A new licence: the name and link of the source's do not fit.
        data |= {"license_name": _line(fields.license_name), "license_link": _line(fields.license_link)}
    data["license"] = data["license"] or _lines(carried.get("license")) or None  # There may be several.
    if data["license"] == "other" and data["license_name"] is None:
        raise errors.UsageError(
            "the model card's license is other, but it has no license_name",
            hint="the Hub wants one: add it to [model.card]",
        )
    data["language"] = _lines(fields.language) or _lines(carried.get("language")) or None
    own_tags = _lines(fields.tags) or [tag for tag in _lines(carried.get("tags")) if tag not in _NOT_CARRIED]
    data["tags"] = list(dict.fromkeys([*TAGS, dtype, *own_tags]))
    return ModelCardData(**{key: value for key, value in data.items() if value is not None})


def _licence(data: ModelCardData) -> str | None:
    terms = data.get("license_name") or data.license
    return ", ".join(terms) if isinstance(terms, list) else terms


def _followed(link: str | None) -> str | None:
    # A link to the web or into the repository. Anything else (javascript:, //host) does not become a link.
    if link is not None and (re.match(r"https?://", link) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", link)):
        return link
    return None


# Front matter


def _front_matter(card: str | None) -> dict[str, Any]:
    # Of an untrusted card: a broken one counts as empty.
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    yaml: Any = importlib.import_module("yaml")  # A dependency of the client.
    match = REGEX_YAML_BLOCK.search((card or "").removeprefix("\ufeff"))
    if match is None or len(match[2]) > _LONGEST_FRONT_MATTER:
        return {}
    try:
        # Without merges (<<): a few lines of them can create more entries than fit in memory.
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
    ):  # Dates and numbers raise it, too.
        return {}
    return found if isinstance(found, dict) else {}


def _line(value: object) -> str | None:
    """A string as one line in which everything is visible; None for anything else."""
    if value is False:
        return "no"  # YAML reads Norwegian as False.
    if not isinstance(value, str) or len(value) > 500:
        return None
    return errors.printable(" ".join(value.split()), None) or None


def _lines(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [line for line in map(_line, values[:200]) if line is not None]


# Loading


def _loader(library: str | None, configs: Mapping[str, str]) -> tuple[str | None, str, str]:
    """The library that loads a model, if any, its class, and what the example calls the result."""
    index, config = (_json(configs.get(name)) for name in CONFIGS)
    model, architectures = config.get("_class_name"), config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if index.get("_class_name") == "OmniGen2Pipeline":
        return "omnigen2", "OmniGen2Pipeline", "pipeline"
    if index:
        return "diffusers", "DiffusionPipeline", "pipeline"
    if library == "diffusers":
        return "diffusers", _class(model, "AutoModel"), "model"
    if architecture or library == "transformers":
        causal = isinstance(architecture, str) and architecture.endswith("ForCausalLM")
        return "transformers", "AutoModelForCausalLM" if causal else _class(architecture, "AutoModel"), "model"
    return None, "", "model"


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json_text.parse(text or "{}", what="it", where={})
    except errors.FormatError:
        return {}
    return found if isinstance(found, dict) else {}


def _class(name: object, otherwise: str) -> str:
    return name if isinstance(name, str) and _IDENTIFIER.fullmatch(name) else otherwise
