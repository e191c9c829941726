"""What the Hub checks in the front matter of a model card."""

from __future__ import annotations

import re

_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_PIPELINES = """
    text-classification token-classification table-question-answering question-answering zero-shot-classification
    translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
    text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
    voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
    image-to-text image-to-image image-to-video unconditional-image-generation video-classification
    reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
    multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
    image-text-to-image image-text-to-video visual-question-answering document-question-answering
    zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
    image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any video-to-video
    other
"""
PIPELINES = frozenset(_PIPELINES.split())
LISTS = ("tags", "language", "base_model", "datasets", "metrics")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def validate(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for a README.md. PyYAML comes with the Hub's client."""
    import yaml  # type: ignore[import-untyped]

    found = _FRONT_MATTER.match(content)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"metadata" must be of type object'], []

    errors = []
    for key in LISTS:
        value = data.get(key, [])
        if isinstance(value, str) and key != "tags":
            value = [value]
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            errors.append(f'"{key}" must be an array of strings')
        elif key == "base_model" and not all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry) for entry in value):
            errors.append(
                '"base_model" with value "'
                + ", ".join(value)
                + '" is not valid. Use a model id from https://hf.co/models.'
            )
        elif key == "language" and not all(
            re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code|other", entry) for entry in value
        ):
            errors.append(
                '"language" must only contain ISO 639-1, 639-2 or 639-3 codes, '
                'or one of "code", "multilingual", "other"'
            )
    licenses = data.get("license", [])
    for value in (
        [licenses] if isinstance(licenses, str) else licenses if isinstance(licenses, list) else [str(licenses)]
    ):
        if str(value) not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
        if value == "other" and not isinstance(data.get("license_name"), str):
            errors.append('"license_name" is required when "license" is "other"')
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    if str(data.get("pipeline_tag", "other")) not in PIPELINES:
        errors.append(f'"pipeline_tag" must be one of [{", ".join(sorted(PIPELINES))}]')
    errors.extend(
        f'"{key}" must be a string'
        for key in ("library_name", "license_name", "license_link")
        if not isinstance(data.get(key, ""), str)
    )
    return errors, []
