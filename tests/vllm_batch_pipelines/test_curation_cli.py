"""`vllm-batch up` with reviews: what is missing is told before anything starts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from resources.label_studio import local_server
from vllm_batch_pipelines.cli.main import app

NAMES = ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "LABEL_STUDIO_PROJECT", "ENABLE_CURATION")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are called, with a data root; what a flag sets is put back when the test ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_BATCH_DATA", str(tmp_path / "data"))
    for name in NAMES:
        monkeypatch.setenv(f"VLLM_BATCH_{name}", "")
        monkeypatch.delenv(f"VLLM_BATCH_{name}")
    return tmp_path


def refusal(*arguments: str) -> str:
    refused = CliRunner().invoke(app, ["up", *arguments])
    assert refused.exit_code == 2, refused.output
    return " ".join(refused.output.split())


def test_enabling_curation_without_a_label_studio_is_told() -> None:
    assert "ENABLE_CURATION is set, but no Label Studio" in refusal("--enable-curation")


def test_a_token_or_schema_that_is_missing_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_PROJECT", "Reviews")
    assert "has no `api_key`" in refusal()
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_API_KEY", "token")
    (folder / "targets.yaml").write_text("label_studio: {hiring: {schema: nowhere.yaml}}")
    assert "nowhere.yaml" in refusal()


def test_a_local_label_studio_that_is_not_installed_is_told_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_server, "_STAMP", folder / "installed")
    assert "make label-studio-venv" in refusal("--with-curation")


def test_a_local_label_studio_beside_another_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "is_installed", lambda: True)
    monkeypatch.setenv("VLLM_BATCH_LABEL_STUDIO_URL", "https://reviews.example.org")
    assert "VLLM_BATCH_LABEL_STUDIO_URL is https://reviews.example.org" in refusal("--with-curation")
    assert not (folder / "data").exists()
