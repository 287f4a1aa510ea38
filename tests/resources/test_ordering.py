"""The order in which lines are asked: sorted within a window, every line once."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.batch_store import requests as requests_module
from resources.batch_store.ordering import rows_to_ask
from resources.batch_store.requests import RequestsSummary, RequestsWriter
from tests.helpers import Asked, catalog_of, chat, ids

ONE_AT_A_TIME = catalog_of(concurrency=1)


def asked_lines(folder: Path, text: str, **options: Any) -> list[int]:
    return Asked(folder, text, options, ONE_AT_A_TIME).run().lines


def test_input_order_is_the_default(tmp_path: Path) -> None:
    assert asked_lines(tmp_path, "".join(chat(f"r{n}", f"{9 - n}", max_tokens=n) for n in range(9))) == [*range(1, 10)]


def test_requests_with_the_same_beginning_are_asked_one_after_another(tmp_path: Path) -> None:
    prefixes = ["You sort mail. ", "You write poems. ", "You translate. "]
    lines = [(prefix, n) for n in range(20) for prefix in prefixes]
    random.Random(1).shuffle(lines)
    text = "".join(
        chat(f"r{place}", f"{prefix}{n}", temperature=n / 10, seed=n) for place, (prefix, n) in enumerate(lines)
    )
    asked = [lines[line - 1][0] for line in asked_lines(tmp_path, text, order="prefix")]
    assert sum(here != there for here, there in pairwise(asked)) == len(prefixes) - 1


def test_tools_and_instructions_come_before_the_messages_in_a_prefix(tmp_path: Path) -> None:
    tool = [{"type": "function", "function": {"name": "look"}}]
    text = chat("1", "a", tools=tool) + chat("2", "a") + chat("3", "b", tools=tool) + chat("4", "b")
    assert asked_lines(tmp_path, text, order="prefix") in ([1, 3, 2, 4], [2, 4, 1, 3])


def test_longest_answers_are_asked_first_and_those_without_a_limit_before_them(tmp_path: Path) -> None:
    limits = [{"max_tokens": 5}, {}, {"max_completion_tokens": 900}, {"max_tokens": 50}, {"max_tokens": "many"}]
    text = "".join(chat(f"r{n}", "hi", **limit) for n, limit in enumerate(limits)) + chat("long", "hi" * 50)
    assert asked_lines(tmp_path, text, order="longest_first") == [6, 5, 2, 3, 4, 1]


def test_limit_from_the_defaults_of_the_batch_counts(tmp_path: Path) -> None:
    text = chat("a") + chat("b", max_tokens=500)
    assert asked_lines(tmp_path, text, order="longest_first", defaults={"max_tokens": 10}) == [2, 1]


@pytest.mark.parametrize("order", ["prefix", "longest_first"])
def test_outputs_are_in_input_order_whatever_is_asked_first(tmp_path: Path, order: str) -> None:
    asked = Asked(tmp_path, "".join(chat(f"r{n}", "x" * (n % 7)) for n in range(50)), {"order": order})
    asked.run()
    assert ids(asked.batch.output_dir / "output.jsonl") == [f"r{n}" for n in range(50)]


def write_parts(folder: Path, bodies: list[dict[str, Any]]) -> int:
    folder.mkdir()
    writer = RequestsWriter(folder)
    for line, body in enumerate(bodies, 1):
        writer.add((line, f"r{line}", "/v1/completions", "m", json.dumps(body).encode(), None, None, None))
    writer.finish(RequestsSummary())
    return len(list(folder.glob("part-*")))


def test_window_is_one_part_of_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "PART_ROWS", 4)
    monkeypatch.setattr(requests_module, "_GROUP_ROWS", 2)
    assert write_parts(tmp_path / "requests", [{"max_tokens": n} for n in range(10)]) == 3
    rows = rows_to_ask(tmp_path / "requests", "m", np.ones(11, np.bool_), "longest_first", bytes)
    assert [line for line, _, _ in rows] == [4, 3, 2, 1, 8, 7, 6, 5, 10, 9]


BODIES = st.dictionaries(
    st.sampled_from(["prompt", "tools", "input", "max_tokens", "temperature", "documents"]),
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-1, 1) | st.text(max_size=3) | st.lists(st.just("x")),
)


@settings(max_examples=40, deadline=None)
@given(bodies=st.lists(BODIES, min_size=1, max_size=30), data=st.data())
def test_every_wanted_line_comes_once_with_its_own_body(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, Any]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("order") / "requests"
    write_parts(folder, bodies)
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(bodies) + 1, max_size=len(bodies) + 1)))
    expected = {line: bodies[line - 1] for line in range(1, len(bodies) + 1) if wanted[line]}
    for order in ("input", "prefix", "longest_first"):
        rows = list(rows_to_ask(folder, "m", wanted, order, bytes))
        assert {line: json.loads(body) for line, _, body in rows} == expected
        assert len(rows) == len(expected)
