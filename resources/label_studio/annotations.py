"""Annotations as rows, and the rule of the gold star.

A gold star is an annotation that is not cancelled and is marked `ground_truth`, or whose schema's gold control says so.
"""

import json
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa

from resources.label_studio.answers import final_text, from_regions, prefill
from resources.label_studio.client import Json, parse_time
from resources.label_studio.schema import CurationSchema
from resources.label_studio.tasks import SOURCE

ANNOTATIONS = pa.schema(
    [
        pa.field("task", pa.int64(), nullable=False),
        pa.field("annotation", pa.int64(), nullable=False),
        ("annotator", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("updated_at", pa.timestamp("us", tz="UTC")),
        ("cancelled", pa.bool_()),
        ("ground_truth", pa.bool_()),
        ("gold", pa.bool_()),
        ("edited", pa.bool_()),
        ("rating", pa.float64()),
        ("original_response", pa.string()),
        ("final_response", pa.string()),
        ("values", pa.string()),
        ("predicted", pa.string()),
        ("batch", pa.string()),
        ("line", pa.int64()),
        ("custom_id", pa.string()),
        ("model", pa.string()),
        ("generation", pa.string()),
        ("schema", pa.string()),
        ("prompt", pa.string()),
        ("system", pa.string()),
        ("conversation", pa.string()),
    ]
)
"""One row an annotation. `values`, `predicted` and `conversation` are JSON; `gold_stars` has the same columns."""


class AnnotationRow(NamedTuple):
    """In the order of ANNOTATIONS' columns."""

    task: int
    annotation: int
    annotator: str
    created_at: datetime
    updated_at: datetime
    cancelled: bool
    ground_truth: bool
    gold: bool
    edited: bool
    rating: float | None
    original_response: str
    final_response: str
    values: str
    predicted: str
    batch: str
    line: int
    custom_id: str
    model: str
    generation: str
    schema: str
    prompt: str
    system: str
    conversation: str

    def document(self) -> dict[str, Any]:
        """As JSON for other systems."""
        found = self._asdict()
        for name in ("values", "predicted", "conversation"):
            found[name] = json.loads(found[name])
        for name in ("created_at", "updated_at"):
            found[name] = found[name].isoformat()
        return found


def rows_of_task(schema: CurationSchema, task: Json) -> list[AnnotationRow]:
    """The annotations of a task of ours; none of a task that somebody else has put into the project."""
    data, meta = task.get("data") or {}, task.get("meta") or {}
    if meta.get("source") != SOURCE:
        return []
    original = str(data.get("response", ""))
    predicted = prefill(schema, original).values
    return [_row(schema, task, data, meta, annotation, original, predicted) for annotation in task["annotations"]]


def to_table(rows: list[AnnotationRow]) -> pa.Table:
    columns: list[Any] = list(zip(*rows, strict=True)) or [()] * len(ANNOTATIONS)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ANNOTATIONS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ANNOTATIONS)


def from_table(table: pa.Table) -> list[AnnotationRow]:
    return [AnnotationRow(**row) for row in table.select(ANNOTATIONS.names).to_pylist()]


def _row(
    schema: CurationSchema, task: Json, data: Json, meta: Json, annotation: Json, original: str, predicted: Json
) -> AnnotationRow:
    values = from_regions(schema, annotation.get("result") or [])
    final, edited = final_text(schema, values, original)
    cancelled = bool(annotation.get("was_cancelled"))
    ground_truth = bool(annotation.get("ground_truth"))
    says_gold = schema.export.gold is not None and values.get(schema.export.gold) is True
    who = annotation.get("completed_by")
    return AnnotationRow(
        task=int(task["id"]),
        annotation=int(annotation["id"]),
        annotator=str(who.get("id") if isinstance(who, dict) else who),
        created_at=parse_time(annotation["created_at"]),
        updated_at=parse_time(annotation["updated_at"]),
        cancelled=cancelled,
        ground_truth=ground_truth,
        gold=not cancelled and (ground_truth or says_gold),
        edited=edited,
        rating=_rating(schema, values),
        original_response=original,
        final_response=final,
        values=_json(values),
        predicted=_json(predicted),
        batch=str(meta.get("batch", "")),
        line=int(data.get("line", 0)),
        custom_id=str(data.get("custom_id", "")),
        model=str(data.get("model", "")),
        generation=str(meta.get("generation", "")),
        schema=schema.id,
        prompt=str(data.get("prompt", "")),
        system=str(data.get("system", "")),
        conversation=_json(data.get("conversation") or []),
    )


def _rating(schema: CurationSchema, values: Json) -> float | None:
    if schema.export.rating is not None:
        found = [values[schema.export.rating]] if schema.export.rating in values else []
    else:
        found = [values[q.id] for q in schema.questions if q.type == "rating" and q.id in values]
    return sum(found) / len(found) if found else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
