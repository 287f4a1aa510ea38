"""What can be wrong with a webhook in `targets.yaml` or in the settings is told when it is read, without a secret."""

from pathlib import Path

import pytest
import yaml

from resources.batch_format.options import parse_options
from resources.errors import SettingsError
from resources.settings import load_settings
from resources.targets import Targets, all_targets, load_targets, webhooks_enabled
from resources.webhooks.target import ENDINGS
from tests.receiver import SECRET

URL = "https://hooks.example.org/services/T0/B0/very-secret-path"


def load(folder: Path, **fields: object) -> Targets:
    target = {"url": URL, "secret": "${OPS_SECRET}"} | fields
    (folder / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"ops": target}}))
    return load_targets(folder / "targets.yaml", {"OPS_SECRET": SECRET, "OTHER": SECRET[:-4] + "AAAA"})


def test_defaults_are_those_of_the_contract(tmp_path: Path) -> None:
    ops = load(tmp_path).webhooks["ops"]
    assert (ops.events, ops.max_attempts, ops.timeout, ops.include_results) == (ENDINGS, 5, 30, False)
    assert (ops.all_batches, ops.allow_insecure, ops.legacy_signature, ops.format) == (False, False, False, "standard")


def test_several_secrets_are_several_keys(tmp_path: Path) -> None:
    keys = load(tmp_path, secret=["${OTHER}", "${OPS_SECRET}"]).webhooks["ops"].keys()
    assert len(set(keys)) == 2


def test_a_secret_that_is_not_set_is_told_when_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"`webhooks.ops.secret` needs the environment variable NOT_THERE"):
        load(tmp_path, secret="${NOT_THERE}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "ftp://example.org/"}, "must begin with https"),
        ({"url": "https://"}, "must begin with https"),
        ({"url": "http://example.org/"}, "`allow_insecure: true`"),
        ({"url": "https://user:very-secret@example.org/"}, "holds a password"),
        ({"url": "https://127.0.0.1/"}, "is a private address"),
        ({"url": "https://[::1]/"}, "is a private address"),
        ({"url": "https://169.254.169.254/latest/meta-data"}, "is a private address"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "is a private address"),
        ({"secret": []}, "needs a `secret`"),
        ({"secret": "very-secret"}, "openssl rand"),
        ({"max_attempts": 11}, "max_attempts"),
        ({"timeout": 4}, "timeout"),
        ({"include_results": True}, "include_results"),
        ({"events": ["batch.done"]}, "batch.completed"),
        ({"events": []}, "events"),
        ({"template": "{{ broken"}, "is no Jinja2 template"),
        ({"max_attemps": 3}, "webhooks.ops.max_attemps"),
    ],
)
def test_what_does_not_fit_is_named_and_no_value_shown(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=r"targets\.yaml") as caught:
        load(tmp_path, **fields)
    assert message in str(caught.value)
    assert "very-secret" not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_neither_url_nor_secret_is_shown(tmp_path: Path) -> None:
    ops = load(tmp_path, format="slack").webhooks["ops"]
    assert "very-secret" not in f"{ops!r} {ops} {ops.place} {load(tmp_path)!r}"
    assert SECRET.removeprefix("whsec_") not in f"{ops!r} {ops.model_dump()} {ops.model_dump_json()}"
    said = f"POST {URL} /services/T0/B0/very-secret-path with {SECRET} and {SECRET.removeprefix('whsec_')}"
    assert ops.redact(said) == "POST *** *** with *** and ***"
    assert ops.place == "https://hooks.example.org/…"


def test_an_old_secret_is_taken_with_the_old_signature_alone(tmp_path: Path) -> None:
    ops = load(tmp_path, secret="old secret", legacy_signature=True).webhooks["ops"]
    assert ops.keys() == [b"old secret"]


# --- From the settings ----------------------------------------------------------------------------------------------


def settings_with(monkeypatch: pytest.MonkeyPatch, folder: Path, **variables: str) -> Targets:
    monkeypatch.chdir(folder)
    for name, value in variables.items():
        monkeypatch.setenv(f"VLLM_BATCH_{name}", value)
    return all_targets(load_settings())


def test_url_and_secret_in_the_settings_define_a_webhook_for_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = settings_with(monkeypatch, tmp_path, WEBHOOK_URL=URL, WEBHOOK_SECRET=SECRET)
    assert targets.webhooks["default"].all_batches
    targets.refuse_unknown(parse_options({"webhook": "default"}, "test"), "test")
    assert "very-secret" not in repr(load_settings())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WEBHOOK_URL": URL}, "VLLM_BATCH_WEBHOOK_SECRET is missing"),
        ({"WEBHOOK_SECRET": SECRET}, "VLLM_BATCH_WEBHOOK_URL is missing"),
        ({"WEBHOOK_URL": "http://example.org/very-secret", "WEBHOOK_SECRET": SECRET}, "is http://"),
        ({"ENABLE_WEBHOOKS": "true"}, "no webhook is defined"),
    ],
)
def test_half_a_webhook_is_told_when_the_settings_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        settings_with(monkeypatch, tmp_path, **variables)
    assert "very-secret" not in str(caught.value)


def test_a_default_defined_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "targets.yaml").write_text(yaml.safe_dump({"webhooks": {"default": {"url": URL, "format": "slack"}}}))
    with pytest.raises(SettingsError, match=r"webhooks.default"):
        settings_with(monkeypatch, tmp_path, WEBHOOK_URL=URL, WEBHOOK_SECRET=SECRET)


@pytest.mark.parametrize(
    ("variables", "enabled"),
    [
        ({}, False),
        ({"WEBHOOK_URL": URL, "WEBHOOK_SECRET": SECRET}, True),
        ({"WEBHOOK_URL": URL, "WEBHOOK_SECRET": SECRET, "ENABLE_WEBHOOKS": "false"}, False),
        ({"WEBHOOK_URL": URL}, True),  # wrong, and told where it is used: no batch fails for it
        ({"WEBHOOK_URL": "", "WEBHOOK_SECRET": "", "ENABLE_WEBHOOKS": ""}, False),
    ],
)
def test_webhooks_are_off_until_one_is_defined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], enabled: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(f"VLLM_BATCH_{name}", value)
    assert webhooks_enabled(load_settings()) is enabled
