"""Targets are defined in one file, by name; a batch can only name them."""

from pathlib import Path

import pytest

from resources.batch_format.options import parse_options
from resources.batch_store.store import BatchStore
from resources.errors import OptionsError, SettingsError
from resources.targets import Targets, load_targets
from tests.helpers import chats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"webhook": "ops"}, "option `webhook`: no target `ops` in `webhooks` of the targets file; there are: none"),
        ({"exports": "lake"}, "option `exports`: no target `lake`"),
        ({"exports": ["lake", "lake2"]}, "option `exports`: no target `lake`"),
        ({"label_studio": "reviews"}, "option `label_studio`: no target `reviews`"),
    ],
)
def test_target_that_is_not_defined_is_refused_when_the_file_is_registered(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(chats(2))
    store = BatchStore(tmp_path / "data")
    with pytest.raises(OptionsError, match=message):
        store.register(path, options)
    assert list(store.keys()) == []


def test_url_is_no_name() -> None:
    options = parse_options({"webhook": "http://evil.example/hook"}, "test")
    with pytest.raises(OptionsError, match="no target"):
        Targets().refuse_unknown(options, "test")


def test_no_file_defines_no_target(tmp_path: Path) -> None:
    assert load_targets(tmp_path / "targets.yaml") == Targets()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not readable as YAML"),
        ("- a", "must hold a mapping of section"),
        ("nobody: {}", "unknown section `nobody`"),
    ],
)
def test_what_is_wrong_with_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_targets(path)
