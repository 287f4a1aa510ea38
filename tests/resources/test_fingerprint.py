"""What makes answers comparable, and what does not."""

from pathlib import Path
from typing import Any

import pytest

from resources.chunk_store.fingerprint import OPERATIONAL_ENGINE_ARGS, engine_versions, fingerprint, fingerprint_inputs
from resources.chunk_store.generation import Generation
from resources.engine.catalog import ModelEntry


def of(**fields: Any) -> str:
    entry = {"name": "m", "source": "org/model", "revision": "main", "engine_args": {"max_model_len": 1024}} | fields
    return fingerprint(fingerprint_inputs(ModelEntry(**entry)))


def of_endpoint(**fields: Any) -> str:
    entry = {"name": "m", "engine": "openai", "base_url": "http://127.0.0.1:1/v1", "source": "theirs"} | fields
    return fingerprint(fingerprint_inputs(ModelEntry(**entry)))


@pytest.mark.parametrize(
    "change",
    [
        {"source": "org/other"},
        {"revision": "abc"},
        {"engine_args": {"max_model_len": 2048}},
        {"engine_args": {"max_model_len": 1024, "quantization": "fp8"}},
        {"engine_args": {"max_model_len": 1024, "an_argument_nobody_knows": 1}},
        {"defaults": {"temperature": 0}},
        {"name": "other"},
        {"engine": "null", "source": None, "revision": None, "engine_args": {}},
    ],
)
def test_what_changes_answers_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert of(**change) != of()


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 5},
        {"aliases": ("other",)},
        {"startup_timeout": 5},
        {"residency": "sleep"},
        {"env": {"VLLM_LOGGING_LEVEL": "DEBUG"}},
        {"engine_args": {"max-model-len": 1024}},
        {"engine_args": {"max_model_len": 1024, **dict.fromkeys(OPERATIONAL_ENGINE_ARGS, 1)}},
        {"engine_args": {"max-model-len": 1024, "tensor-parallel-size": 2}},
    ],
)
def test_what_does_not_change_answers_keeps_the_fingerprint(change: dict[str, Any]) -> None:
    assert of(**change) == of()


def test_endpoint_is_its_url_and_its_model_and_not_its_key() -> None:
    assert of_endpoint(base_url="http://127.0.0.1:2/v1") != of_endpoint()
    assert of_endpoint(source="other") != of_endpoint()
    assert of_endpoint(api_key_env="KEY") == of_endpoint()


def test_local_model_is_its_files(tmp_path: Path) -> None:
    def identity(folder: Path) -> str:
        return of(source=str(folder))

    def folder(name: str, **changes: bytes | None) -> Path:
        files = {"config.json": b"{}", "chat_template.jinja": b"x", "model.safetensors": b"weights", ".cache": b"1"}
        path = tmp_path / name
        path.mkdir()
        for file, content in (files | {k.replace("__", "."): v for k, v in changes.items()}).items():
            if content is not None:
                (path / file).write_bytes(content)
        return path

    one = identity(folder("one"))
    assert identity(folder("a-copy-elsewhere")) == one
    assert (
        identity(folder("same-size-weights", model__safetensors=b"WEIGHTS")) == one
    )  # not hashed: it would take minutes
    assert identity(folder("read-me", README__md=b"new")) == one
    assert identity(folder("config", config__json=b"{ }")) != one
    assert identity(folder("template", chat_template__jinja=b"y")) != one
    assert identity(folder("weights", model__safetensors=b"more weights")) != one
    assert identity(folder("more", tokenizer__json=b"{}")) != one


def test_no_key_is_in_what_the_manifest_shows() -> None:
    entry = ModelEntry(name="m", engine="openai", base_url="http://127.0.0.1:1/v1", api_key_env="MY_KEY")
    assert "MY_KEY" not in str(fingerprint_inputs(entry))


def test_generation_folder_stays_below_the_results_whatever_the_model_is_called(tmp_path: Path) -> None:
    folder = Generation.of(tmp_path, ModelEntry(name="org/../m:latest", engine="null")).folder
    assert folder.parent.parent == tmp_path
    assert Generation.of(tmp_path, ModelEntry(name="org--m", engine="null")).folder != (
        Generation.of(tmp_path, ModelEntry(name="org/m", engine="null")).folder
    )


def test_versions_are_told_and_not_part_of_the_fingerprint() -> None:
    entry = ModelEntry(name="m", engine="null")
    assert "vllm-batch-pipelines" in engine_versions(entry)
    assert "version" not in {key for key in fingerprint_inputs(entry) if key != "transform_version"}
