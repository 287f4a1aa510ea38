"""models.yaml: what is read, and what is refused by name."""

import json
from pathlib import Path

import pytest

from resources.chunk_store.fingerprint import fingerprint_inputs
from resources.engine.catalog import AdapterEntry, Catalog, EngineKind, Residency, load_catalog
from resources.engine.vllm_command import server_arguments
from resources.errors import CatalogError


def loaded(folder: Path, text: str) -> Catalog:
    (folder / "models.yaml").write_text(text)
    return load_catalog(folder / "models.yaml")


def test_every_field_is_read(tmp_path: Path) -> None:
    catalog = loaded(
        tmp_path,
        """
models:
  local:
    source: ./models/one
    revision: main
    engine_args: {max_model_len: 1024}
    env: {VLLM_CPU_KVCACHE_SPACE: 2}
    aliases: [one, org/one]
    defaults: {temperature: 0}
    concurrency: 8
    startup_timeout: 60
    residency: sleep
    allowed_media_domains: [example.com]
  hosted: {engine: openai, base_url: "http://127.0.0.1:1/v1", api_key_env: KEY, source: their-name}
  hub: {source: org/name}
  nothing: {engine: "null"}
  bare: {engine: null}
""",
    )
    local = catalog.get("org/one")
    assert (local.name, local.engine, local.concurrency) == ("local", EngineKind.VLLM, 8)
    assert (local.residency, catalog.get("hub").residency) == (Residency.SLEEP, Residency.STOP)
    assert local.local_source == tmp_path / "models" / "one"
    assert local.env == {"VLLM_CPU_KVCACHE_SPACE": "2"}
    assert (catalog.get("hosted").served_name, local.served_name) == ("their-name", "local")
    assert catalog.get("hub").local_source is None
    assert catalog.get("nothing").engine is catalog.get("bare").engine is EngineKind.NULL
    assert set(catalog.names) == {"local", "one", "org/one", "hosted", "hub", "nothing", "bare"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {m: {engine: 'null', sorce: x}}", "model `m`: unknown key `sorce` (did you mean `source`?)"),
        ("models: {m: {engine: 'null', name: x}}", "model `m`: unknown key `name`"),
        ("models: {m: {1: x}}", "model `m`: keys must be text"),
        ("models: {m: vllm}", "model `m` must be a mapping"),
        ("models: {m: {}}", "model `m`: engine vllm needs `source`"),
        ("models: {m: {engine: openai}}", "model `m`: engine openai needs `base_url`"),
        ("models: {m: {engine: 'null', revision: x}}", "are for engine vllm alone"),
        ("models: {m: {source: x, base_url: y}}", "are for engine openai alone"),
        ("models: {m: {engine: tgi}}", "model `m`: engine"),
        ("models: {m: {source: x, residency: nap}}", "model `m`: residency"),
        ("models: {m: {engine: 'null', residency: sleep}}", "`residency: sleep` is for engine vllm alone"),
        ("models: {m: {engine: 'null', concurrency: 0}}", "model `m`: concurrency"),
        ("models: {'../m': {engine: 'null'}}", "model `../m`: name"),
        ("models: {a: {engine: 'null', aliases: [b]}, b: {engine: 'null'}}", "`b` of model `b` is taken by model `a`"),
        ("models: {a: {engine: 'null', aliases: [x, x]}}", "the name `x`"),
        ("models: {a: {engine: 'null'}, a: {source: x}}", "key `a` stands twice"),
        ("models: {a: {engine: 'null', engine: openai}}", "key `engine` stands twice"),
        ("models: []", "exactly one key, `models`"),
        ("modles: {}", "exactly one key, `models`"),
        ("models: {}\nother: 1", "exactly one key, `models`"),
        ("models: [", "not readable as YAML"),
        ("models: {m: {revision: 2026-13-45}}", "not readable as YAML"),
        ("", "exactly one key, `models`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CatalogError) as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)
    assert str(tmp_path / "models.yaml") in str(caught.value)


def test_missing_file_is_named_with_the_setting_that_points_to_it(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="VLLM_BATCH_MODELS_FILE"):
        load_catalog(tmp_path / "models.yaml")


def test_anchors_are_fine_in_a_file_of_the_owner(tmp_path: Path) -> None:
    text = "models:\n  a: &a {engine: 'null', concurrency: 5}\n  b: {<<: *a, aliases: [c]}\n"
    assert loaded(tmp_path, text).get("c").concurrency == 5


def test_unknown_model_comes_with_the_nearest_name(tmp_path: Path) -> None:
    catalog = loaded(tmp_path, "models: {my-model: {engine: 'null'}}")
    assert catalog.resolve("nobody") is None
    with pytest.raises(CatalogError, match="did you mean `my-model`"):
        catalog.get("my-modle")
    assert "it holds: my-model" in catalog.unknown("x")


def test_missing_model_folder_is_a_problem_and_nothing_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text("{}")
    text = "models: {a: {source: ./good}, b: {source: ./gone}, c: {source: org/hub}, d: {engine: 'null'}}"
    assert loaded(tmp_path, text).problems() == {"b": f"no model at {tmp_path / 'gone'} (config.json is not there)"}


def test_catalog_of_the_repository_is_valid() -> None:
    catalog = load_catalog(Path(__file__).resolve().parents[2] / "models.yaml")
    assert "smollm2-135m" in catalog.names


def test_adapters_are_models_of_their_own_answered_by_their_base(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models: {base: {source: o/m, defaults: {seed: 1}, adapters: {legal: ./legal, chat: o/chat}}}")
    catalog = load_catalog(path)
    assert list(catalog.entries) == ["base", "legal", "chat"]
    legal = catalog.get("legal")
    assert isinstance(legal, AdapterEntry)
    assert (legal.served_name, legal.defaults, legal.adapter) == ("legal", {"seed": 1}, str(tmp_path / "legal"))
    assert legal.server_entry == catalog.get("base")
    assert "no adapter at" in catalog.problems()["legal"]
    assert fingerprint_inputs(legal)["adapter"] == {}
    assert fingerprint_inputs(catalog.get("chat"))["adapter"] == "o/chat"
    arguments = server_arguments(legal.server_entry)
    at = arguments.index("--lora-modules")
    assert [json.loads(text)["name"] for text in arguments[at + 1 : at + 3]] == ["legal", "chat"]
    assert arguments[at - 1] == "--enable-lora"


def test_an_adapter_with_the_name_of_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models: {base: {source: o/m, adapters: {other: o/a}}, other: {source: o/m}}")
    with pytest.raises(CatalogError, match="`other` of model `other` is taken"):
        load_catalog(path)
