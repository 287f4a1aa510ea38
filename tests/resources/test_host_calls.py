"""When a canary has given the same again."""

from typing import Any

import pytest

from resources.engine.host_calls import agree

TOKENS, VECTOR = {"tokens": [7, 8, 9]}, {"vector": [0.5, -0.25]}


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (TOKENS, {"tokens": [7, 8, 9]}, True),
        (TOKENS, {"tokens": [7, 8, 10]}, False),
        (TOKENS, {"tokens": [7, 8]}, False),
        ({"tokens": " a text"}, {"tokens": " another"}, False),
        (TOKENS, VECTOR, False),
        (VECTOR, {"vector": [0.5001, -0.25]}, True),
        (VECTOR, {"vector": [0.52, -0.25]}, False),
        (VECTOR, {"vector": [0.5]}, False),
        (VECTOR, {"vector": [float("nan"), -0.25]}, False),
        (VECTOR, {"vector": []}, False),
        ({"vector": [[0.5], [0.1]]}, {"vector": [[0.5], [0.1]]}, True),
        ({"vector": [[0.5], [0.1]]}, {"vector": [[0.5], [0.2]]}, False),
    ],
)
def test_tokens_to_the_last_one_and_vectors_but_for_their_last_digits(
    before: dict[str, Any], after: dict[str, Any], same: bool
) -> None:
    assert agree([before], [after]) == same
    assert not agree([before], None)
