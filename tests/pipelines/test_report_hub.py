"""The report of a repository on the Hub, from its manifest alone; and its model card."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import get_session

from df11.converter import parquet
from df11.converter.manifest import FILE_NAME, Origin
from df11.formats import errors
from df11.pipelines import card, report
from df11.pipelines.card import CardFields
from df11.storage import client as hub_client
from tests.support import manifests as made
from tests.support.hub.server import corrupt


@pytest.fixture(autouse=True)
def impatient(client, monkeypatch):
    """No waiting between tries."""
    del client
    monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))


def test_only_the_manifest_is_downloaded(hub, tmp_path):
    manifest = made.model(origin=Origin("owner/name", "c" * 40, ""))
    files = {FILE_NAME: parquet.to_bytes(manifest), "text/model.df11": b"x" * 50_000, "config.json": b"{}"}
    hub.create("me/name-df11").commit(files)
    written = report.write_report("hf://me/name-df11", tmp_path)
    assert written[0].read_text() == report.render_report(manifest, "me/name-df11")
    assert hub.count("GET", rf".*/resolve/.*{FILE_NAME}") > 0
    assert hub.count("GET", r".*/resolve/.*(model\.df11|config\.json)") == 0


def test_folder_in_a_repository(hub):
    manifest = made.model()
    hub.create("me/m").commit({f"sub/{FILE_NAME}": parquet.to_bytes(manifest), FILE_NAME: b"another"})
    assert report.find_manifest("hf://me/m/sub") == (manifest, "me/m")


def test_repository_without_a_manifest(hub, tmp_path):
    hub.create("me/m").commit({"model.df11": b"x", f"sub/{FILE_NAME}": b""})
    with pytest.raises(errors.MissingError, match=FILE_NAME):
        report.write_report("hf://me/m", tmp_path)


def test_missing_repository(hub, tmp_path):
    del hub
    with pytest.raises(errors.MissingError):
        report.write_report("hf://me/none", tmp_path)


def test_wrong_bytes_are_refused(hub, tmp_path):
    hub.create("me/m").commit({FILE_NAME: parquet.to_bytes(made.model())})
    hub.inject("GET", r".*parquet.*|.*/lfs.*|.*/objects.*", corrupt(100), times=50)
    with pytest.raises(errors.Df11Error):
        report.write_report("hf://me/m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def card_of(fields: CardFields) -> ModelCard:
    return card.model_card(
        made.evil(),
        fields,
        "---\nlanguage: no\ntags: ['a: b', '- c']\n---\n",
        repository="me/m",
        plots=card.plot_paths(made.evil()),
        configs={},
    )


def test_the_hub_takes_the_card(hub, client):
    text = str(card_of(CardFields(license="mit", title='a: "title"\n---\n| x')))
    repository = hub.create("me/m")
    client.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/m")
    assert hub.count("POST", r".*validate-yaml.*") == 1
    assert repository.read("README.md").decode() == text


def test_the_hub_is_asked_before_anything_is_uploaded(hub, monkeypatch):
    class Session:
        # ModelCard.validate() of older clients goes to huggingface.co, whatever the endpoint.
        def post(self, url: str, **options: Any) -> Any:
            return get_session().post(url.replace("https://huggingface.co", hub.endpoint), **options)

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    card_of(CardFields(license="mit")).validate()
    assert hub.count("POST", r".*validate-yaml.*") == 1
    with pytest.raises(ValueError, match="license"):
        card_of(CardFields(license="no such licence")).validate()
