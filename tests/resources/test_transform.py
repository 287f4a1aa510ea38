"""From a line's body to the body that is sent."""

import json

from resources.batch_format.options import BatchOptions
from resources.engine.catalog import EngineKind, ModelEntry
from resources.engine.transform import body_transform

NULL = ModelEntry(name="m", engine=EngineKind.NULL, aliases=("alias",))
BODY = b'{ "model":"alias",  "temperature":1.0, "text":"\\u00e9", "model_2": 1e2 }'


def endpoint(source: str | None = None) -> ModelEntry:
    return ModelEntry(name="m", engine=EngineKind.OPENAI, base_url="http://127.0.0.1:1/v1", source=source)


def test_body_is_sent_verbatim_where_nothing_goes_in() -> None:
    assert body_transform(BatchOptions(), NULL)(BODY) == BODY


def test_line_stands_over_batch_and_batch_over_catalog() -> None:
    entry = NULL.model_copy(update={"defaults": {"a": "catalog", "b": "catalog", "c": "catalog"}})
    options = BatchOptions(defaults={"a": "batch", "b": "batch"})
    sent = json.loads(body_transform(options, entry)(b'{"model":"m","a":"line","d":null}'))
    assert sent == {"model": "m", "a": "line", "b": "batch", "c": "catalog", "d": None}


def test_a_null_in_the_line_stands_over_a_default() -> None:
    sent = json.loads(body_transform(BatchOptions(defaults={"stop": "x"}), NULL)(b'{"model":"m","stop":null}'))
    assert sent["stop"] is None


def test_option_model_replaces_the_name_in_the_line() -> None:
    sent = json.loads(body_transform(BatchOptions(model="alias"), NULL)(b'{"model":"other","n":1}'))
    assert sent == {"model": "m", "n": 1}


def test_endpoint_gets_its_own_name_for_the_model() -> None:
    assert json.loads(body_transform(BatchOptions(), endpoint("theirs"))(b'{"model":"alias"}')) == {"model": "theirs"}
    assert json.loads(body_transform(BatchOptions(), endpoint())(b'{"model":"alias"}')) == {"model": "m"}


def test_values_survive_when_a_default_goes_in() -> None:
    body = b'{"model":"m","n":123456789012345678901234567890,"f":1e-7,"t":"\\ud83d\\ude00\\u0000","o":{"z":1,"a":[]}}'
    sent = json.loads(body_transform(BatchOptions(defaults={"seed": 1}), NULL)(body))
    assert sent == json.loads(body) | {"seed": 1}
    assert list(sent["o"]) == ["z", "a"]
