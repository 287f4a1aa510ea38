"""Published rows as tasks of Label Studio: what reviewers read, where it is from, and the model's answer filled in."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from resources.batch_store.batch import Batch
from resources.batch_store.requests import read_batches
from resources.errors import BatchError
from resources.label_studio.answers import Prefilled, prefill, to_regions
from resources.label_studio.schema import CurationSchema

SOURCE = "vllm_batch_pipelines"
_COLUMNS = ["line", "custom_id", "model", "status_code", "error_code", "response", "text"]


@dataclass(frozen=True)
class ReviewRow:
    """A successful row of a batch with the body of its request; `answer` tells one answer from another."""

    line: int
    custom_id: str
    model: str
    response: str
    raw: str
    body: str | None

    @property
    def answer(self) -> str:
        return hashlib.sha256(self.response.encode()).hexdigest()[:16]


def review_rows(batch: Batch) -> Iterator[ReviewRow]:
    """The successful rows of the published results in line order. Error rows are not reviewed.

    `body` is None where the batch is pruned: only what is imported already can be told then.
    """
    bodies = _bodies(batch)
    line, body = next(bodies, (None, None))
    for path in sorted((batch.output_dir / "results").glob("part-*.parquet")):
        with pq.ParquetFile(path) as part:
            for rows in part.iter_batches(4096, columns=_COLUMNS):
                for row in rows.to_pylist():
                    if row["error_code"] is not None:
                        continue
                    while line is not None and line < row["line"]:
                        line, body = next(bodies, (None, None))
                    yield ReviewRow(
                        row["line"],
                        row["custom_id"] or "",
                        row["model"] or "",
                        row["text"] if row["text"] is not None else row["response"] or "",
                        row["response"] or "",
                        body if line == row["line"] else None,
                    )


def _bodies(batch: Batch) -> Iterator[tuple[int | None, str | None]]:
    for rows in read_batches(batch.requests_dir, ["line", "body"]):
        yield from zip(rows["line"].to_pylist(), rows["body"].to_pylist(), strict=True)


def make_task(batch: Batch, schema: CurationSchema, row: ReviewRow, prefilled: Prefilled) -> dict[str, Any]:
    """The task of a row, as an import takes it.

    Raises:
        BatchError: the batch is pruned, so what was asked is not known any more.
    """
    if row.body is None:
        raise BatchError(
            f"{batch.key}: its requests were pruned, so line {row.line} cannot be shown to reviewers; "
            "`vllm-batch run FILE --mode restart` brings them back."
        )
    asked = _conversation(json.loads(row.body))
    users = [message["content"] for message in asked if message["role"] == "user"]
    system = "\n\n".join(message["content"] for message in asked if message["role"] in ("system", "developer"))
    data = {
        "batch": batch.key,
        "line": row.line,
        "custom_id": row.custom_id,
        "model": row.model,
        "prompt": users[-1] if users else "",
        "system": system,
        "conversation": asked,
        "response": row.response,
        **prefilled.values,
    }
    generation = batch.current().get(row.model, {}).get("generation", "")
    meta = {
        "batch": batch.key,
        "generation": generation,
        "custom_id": row.custom_id,
        "source": SOURCE,
        "line": row.line,
        "answer": row.answer,
    }
    task = {"data": _storable(data), "meta": _storable(meta)}
    prediction = make_prediction(schema, row, prefilled)
    return task | {"predictions": [prediction] if prediction is not None else []}


def make_prediction(schema: CurationSchema, row: ReviewRow, prefilled: Prefilled) -> dict[str, Any] | None:
    """The model's answer as regions; None where it has none."""
    regions = to_regions(schema, prefilled.values)
    if not regions:
        return None
    prediction: dict[str, Any] = {"model_version": row.model or "unknown", "result": _storable(regions)}
    score = _mean_probability(row.raw) if schema.rendering.score else None
    return prediction | ({"score": score} if score is not None else {})


def fill_in(schema: CurationSchema, row: ReviewRow) -> Prefilled:
    return prefill(schema, row.response)


def _conversation(body: Any) -> list[dict[str, str]]:
    """What was asked, as messages of text, whatever the endpoint."""
    if not isinstance(body, dict):
        return []
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list) and all(isinstance(item, dict) and "role" in item for item in messages) and messages:
        asked = [{"role": str(item["role"]), "content": _text(item.get("content"))} for item in messages]
    else:
        given = next((body[name] for name in ("prompt", "input", "text_1", "query") if name in body), "")
        asked = [{"role": "user", "content": _text(given)}]
    if isinstance(body.get("instructions"), str):
        asked.insert(0, {"role": "system", "content": body["instructions"]})
    return asked


def _text(content: Any) -> str:
    """Text of a message's content; parts that are no text are named in brackets."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(
            part if isinstance(part, str) else str(part.get("text") or f"[{part.get('type', 'part')}]")
            for part in content
            if isinstance(part, str | dict)
        )
    return json.dumps(content, ensure_ascii=False)


def _storable(value: Any) -> Any:
    """Without what PostgreSQL or UTF-8 cannot hold: U+0000 and halves of surrogate pairs become U+FFFD."""
    if isinstance(value, str):
        value = value.replace("\0", "\ufffd")
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return value


def _mean_probability(response: str) -> float | None:
    try:
        tokens = json.loads(response)["choices"][0]["logprobs"]["content"]
        found = [float(token["logprob"]) for token in tokens]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return round(math.exp(sum(found) / len(found)), 6) if found else None
