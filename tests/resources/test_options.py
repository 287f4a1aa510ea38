"""Batch options: the sidecar and --option."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from resources.batch_format.options import (
    MAX_SIDECAR_BYTES,
    BatchOptions,
    load_sidecar,
    options_from_text,
    parse_options,
)
from resources.errors import BatchError, InputRefused, OptionsError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def sidecar(folder: Path, text: str | bytes, name: str = "in.jsonl") -> dict[str, Any]:
    (folder / "in.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_sidecar(folder / name)


def test_every_option_is_taken_from_a_sidecar(tmp_path: Path) -> None:
    text = """
        model: m
        defaults: {temperature: 0, max_tokens: 16, stop: [a, b]}
        on_invalid: reject
        chunk_rows: 500
        flush_seconds: 2
        max_attempts: 5
        request_timeout: 60.5
        order: prefix
        dedupe: true
        deadline: 24h
        priority: -1
        metadata: {team: support}
    """
    options = parse_options(sidecar(tmp_path, text), "in.yaml")
    assert set(options.model_fields_set) == set(BatchOptions.model_fields)
    assert options.defaults == {"temperature": 0, "max_tokens": 16, "stop": ["a", "b"]}
    assert (options.on_invalid, options.chunk_rows, options.flush_seconds, options.priority) == ("reject", 500, 2.0, -1)
    assert BatchOptions.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.JSONL.zst"])
def test_sidecar_has_the_stem_of_the_file(tmp_path: Path, name: str) -> None:
    assert sidecar(tmp_path, "model: m", name) == {"model": "m"}


def test_no_or_empty_sidecar_is_no_options(tmp_path: Path) -> None:
    assert load_sidecar(tmp_path / "in.jsonl") == {}
    assert sidecar(tmp_path, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"chunk_row": 5}, "unknown option `chunk_row`; did you mean `chunk_rows`?"),
        ({"zzz": 5}, "unknown option `zzz`; options are model, "),
        ({"chunk_rows": "500"}, "option `chunk_rows`"),
        ({"chunk_rows": True}, "option `chunk_rows`"),
        ({"chunk_rows": 0}, "option `chunk_rows`"),
        ({"model": ""}, "option `model`"),
        ({"model": 5}, "option `model`"),
        ({"model": "\ud800"}, "option `model`"),
        ({"on_invalid": "ignore"}, "option `on_invalid`"),
        ({"flush_seconds": 0}, "option `flush_seconds`"),
        ({"max_attempts": 0}, "option `max_attempts`"),
        ({"request_timeout": float("nan")}, "option `request_timeout`"),
        ({"priority": 2}, "option `priority`"),
        ({"order": "random"}, "option `order`"),
        ({"dedupe": 1}, "option `dedupe`"),
        ({"metadata": {"a": 5}}, "option `metadata.a`"),
        ({"metadata": ["a"]}, "option `metadata`"),
        ({"defaults": {"model": "m"}}, "`model` is an option of its own"),
        ({"defaults": {"stream": True}}, "`stream` is not supported"),
        ({"defaults": {"stop": datetime(2026, 1, 1).date()}}, "option `defaults`: must hold what JSON can say"),
        ({"defaults": {"temperature": float("nan")}}, "what JSON can say"),
        ({"defaults": {"a": {1: 2, "b": 3}}}, "what JSON can say"),
        ({"defaults": {"a": {"x"}}}, "what JSON can say"),
        ({"defaults": {"a": "\ud800"}}, "what JSON can say"),
        ({"deadline": "soon"}, "option `deadline`: must be a duration"),
        ({"deadline": "2026-12-01T06:00:00"}, "needs a zone"),
        ({"deadline": datetime(2026, 12, 1).date()}, "needs a zone"),
        ({"deadline": 5}, "option `deadline`"),
    ],
)
def test_option_that_does_not_fit_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionsError) as caught:
        parse_options(values, "options of in.jsonl")
    assert str(caught.value).startswith("options of in.jsonl: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", NOW + timedelta(seconds=90)),
        ("1.5 h", NOW + timedelta(minutes=90)),
        ("7d", NOW + timedelta(days=7)),
        ("'2026-12-01T06:00:00+02:00'", datetime(2026, 12, 1, 4, tzinfo=UTC)),
        ("2026-12-01T06:00:00+02:00", datetime(2026, 12, 1, 4, tzinfo=UTC)),
        ("2026-12-01T06:00:00Z", datetime(2026, 12, 1, 6, tzinfo=UTC)),
    ],
)
def test_deadline_is_a_duration_or_a_time(tmp_path: Path, text: str, moment: datetime) -> None:
    for values in (sidecar(tmp_path, f"deadline: {text}"), options_from_text([f"deadline={text}"])):
        assert parse_options(values, "x").deadline_at(NOW) == moment


def test_no_deadline_is_never() -> None:
    assert BatchOptions().deadline_at(NOW) is None


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: [*a, *a]",
        "model: a\nmodel: b",
        "defaults: {a: 1, a: 2}",
        "model: [",
        "- model",
        "just text",
        "1: 2",
        "deadline: 2026-13-45",
        "chunk_rows: 0b_",
        "model: !!python/object/apply:os.getcwd []",
        b"model: \xff",
        "model: " + "[" * 1000,
        "# " + "x" * MAX_SIDECAR_BYTES,
    ],
)
def test_sidecar_that_is_not_a_plain_small_mapping_is_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(OptionsError, match=r"in\.yaml"):
        sidecar(tmp_path, text)


def test_sidecar_must_be_a_file_of_its_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("model: m")
    (tmp_path / "in.yaml").symlink_to(secret)
    (tmp_path / "dir.yaml").mkdir()
    os.mkfifo(tmp_path / "fifo.yaml")
    for name in ("in.jsonl", "dir.jsonl", "fifo.jsonl"):
        with pytest.raises(InputRefused, match=r"\.yaml"):
            load_sidecar(tmp_path / name)


def test_options_on_the_command_line_are_yaml() -> None:
    pairs = ["chunk_rows=500", "defaults={temperature: 0}", "model=a=b", "metadata={team: support}", "deadline="]
    assert options_from_text(pairs) == {
        "chunk_rows": 500,
        "defaults": {"temperature": 0},
        "model": "a=b",
        "metadata": {"team": "support"},
        "deadline": None,
    }


@pytest.mark.parametrize(
    "pair", ["chunk_rows", "=5", "a=[", "a=&x [*x]", "a=2026-13-45", "a=" + "[" * 1000, "a={b: 1, b: 2}"]
)
def test_malformed_pair_is_refused(pair: str) -> None:
    with pytest.raises(BatchError, match="--option"):
        options_from_text([pair])


def test_only_model_and_defaults_change_answers() -> None:
    assert (
        BatchOptions(chunk_rows=5, priority=1, metadata={"a": "b"}).answer_changing()
        == BatchOptions().answer_changing()
    )
    assert BatchOptions(model="m").answer_changing() != BatchOptions().answer_changing()
    assert BatchOptions(defaults={"n": 1}).answer_changing() != BatchOptions().answer_changing()
