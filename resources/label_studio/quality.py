"""What reviews say about the answers: how often people agree with the model, change it, and star it."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from resources.label_studio.annotations import AnnotationRow


def quality(rows: Iterable[AnnotationRow]) -> list[dict[str, Any]]:
    """One row a model and schema: annotations that are not cancelled, rates between 0 and 1, and by question the share
    of annotations that say what the model said, of those where both said something."""
    groups: dict[tuple[str, str], list[AnnotationRow]] = defaultdict(list)
    for row in rows:
        if not row.cancelled:
            groups[row.model, row.schema].append(row)
    return [_numbers(model, schema, found) for (model, schema), found in sorted(groups.items())]


def _numbers(model: str, schema: str, rows: list[AnnotationRow]) -> dict[str, Any]:
    same: dict[str, int] = defaultdict(int)
    both: dict[str, int] = defaultdict(int)
    for row in rows:
        values, predicted = json.loads(row.values), json.loads(row.predicted)
        for question in values.keys() & predicted.keys():
            both[question] += 1
            same[question] += values[question] == predicted[question]
    ratings = [row.rating for row in rows if row.rating is not None]
    return {
        "model": model,
        "schema": schema,
        "annotations": len(rows),
        "tasks": len({row.task for row in rows}),
        "annotators": len({row.annotator for row in rows}),
        "edit_rate": round(sum(row.edited for row in rows) / len(rows), 4),
        "gold_rate": round(sum(row.gold for row in rows) / len(rows), 4),
        "mean_rating": round(sum(ratings) / len(ratings), 3) if ratings else None,
        "agreement": {question: round(same[question] / both[question], 4) for question in sorted(both)},
    }
