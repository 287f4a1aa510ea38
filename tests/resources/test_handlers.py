"""The classes that the settings name: each can be used, or the settings say why not."""

import pytest

from resources.errors import SettingsError
from resources.handlers.loading import load_handlers, usable_handlers
from resources.settings import load_settings

HERE = "tests.resources.own_handlers"


def paths(*names: str) -> list[str]:
    return [f"{HERE}:{name}" for name in names]


def test_a_handler_stands_after_those_that_it_names() -> None:
    assert [handler.name for handler in load_handlers(paths("Report", "Plain"))] == ["Plain", "Report"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            paths("First", "Second"),
            "handlers wait for one another: (First after Second after First|Second after)",
        ),
        (paths("Report"), "Report is to come after 'Plain'; handlers are: Report"),
        (paths("Strange"), "own_handlers:Strange has no method `enabled`"),
        (paths("Plain", "Twin"), "the name 'Plain' is empty or stands twice"),
        (paths("Missing"), "own_handlers:Missing.*AttributeError"),
        (paths("Breaks"), "OSError: no licence"),
        (["no.such.module:Class"], "ModuleNotFoundError"),
        (["nothing"], "must be module:Class"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(given: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_handlers(given)


def test_those_that_cannot_be_used_are_left_out_and_take_only_those_with_them_that_wait_for_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = [*paths("Breaks", "AfterHangs", "First", "Second", "Missing"), "no.such.module:Class"]
    found = usable_handlers([*broken[:3], *paths("Report"), *broken[3:], *paths("Plain")])
    assert [handler.name for handler in found] == ["Plain", "Report"]
    for path in broken:
        assert path.partition(":")[2] in caplog.text
    assert usable_handlers(broken) == []


def test_the_setting_is_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_RESULT_HANDLERS", "a:B, c.d:E ,")
    assert load_settings().result_handlers == ("a:B", "c.d:E")
