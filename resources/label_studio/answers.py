"""A model's answer as the reviewer's form: JSON -> answers to the questions -> regions of Label Studio, and back.

Nothing is made up: a question that the answer does not speak of has no region.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from resources.label_studio.label_config import Control, control_of, parse_controls
from resources.label_studio.schema import CurationSchema, Question

_FENCE = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)


@dataclass(frozen=True)
class Prefilled:
    """`values` by question; `fits` is None where the schema asks for no JSON. `problem` says what does not fit."""

    values: dict[str, Any] = field(default_factory=dict)
    fits: bool | None = None
    problem: str = ""


def prefill(schema: CurationSchema, text: str) -> Prefilled:
    """What an answer says to a schema's questions. One that does not fit says nothing at all."""
    whole = {question.id: text for question in schema.questions if question.source == "response" and text.strip()}
    if not schema.answered:
        return Prefilled(whole)
    found = _json_object(text)
    if found is None:
        return Prefilled(fits=False, problem="not a JSON object")
    values = dict(whole)
    for question in schema.answered:
        given = found.get(question.id)
        if given is None or given == "":
            if question.required:
                return Prefilled(fits=False, problem=f"no `{question.id}`")
            continue
        value = _fitting(question, given)
        if value is None:
            return Prefilled(fits=False, problem=f"`{question.id}` does not fit a {question.type}")
        values[question.id] = value
    if len(values) == len(whole):
        return Prefilled(fits=False, problem="none of the questions is answered")
    return Prefilled(values, fits=True)


def to_regions(schema: CurationSchema, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Regions of a prediction (or of an annotation) that hold these values."""
    regions = []
    for question in schema.questions:
        if question.id in values:
            control = _control(schema, question)
            regions.append(
                {
                    "id": question.id,
                    "from_name": control.name,
                    "to_name": control.to_name,
                    "type": control.type,
                    "value": _region_value(question, values[question.id]),
                }
            )
    return regions


def from_regions(schema: CurationSchema, regions: list[dict[str, Any]]) -> dict[str, Any]:
    """The values that a reviewer's regions hold; of controls that the schema does not have, nothing."""
    questions = {question.id: question for question in schema.questions}
    values = {}
    for region in regions:
        question = questions.get(region.get("from_name", ""))
        value = None if question is None else _value_of(question, region.get("value") or {})
        if question is not None and value is not None:
            values[question.id] = value
    return values


def final_text(schema: CurationSchema, values: dict[str, Any], original: str) -> tuple[str, bool]:
    """The answer as the reviewer leaves it, and whether they changed it.

    One whose questions are the fields of a JSON object is written anew only where a field differs: else the model's
    own words stand.
    """
    if schema.export.final is not None:
        final = values.get(schema.export.final)
        return (str(final), final != original) if final is not None else (original, False)
    if not schema.answered:
        return original, False
    mine = {question.id: values[question.id] for question in schema.answered if question.id in values}
    theirs = prefill(schema, original)
    if mine == theirs.values or not mine:
        return original, False
    kept = _json_object(original) or {}
    others = {key: value for key, value in kept.items() if key not in {question.id for question in schema.answered}}
    return json.dumps(mine | others, ensure_ascii=False), True


def _json_object(text: str) -> dict[str, Any] | None:
    fenced = _FENCE.search(text)
    for candidate in (text, fenced[1] if fenced else None):
        if candidate is None:
            continue
        try:
            found = json.loads(candidate, parse_constant=_refuse)
        except (ValueError, RecursionError):
            continue
        return found if isinstance(found, dict) else None
    return None


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _fitting(question: Question, given: Any) -> Any:
    """The value as the form holds it; None where it does not fit."""
    match question.type:
        case "choice" if question.multiple:
            chosen = given if isinstance(given, list) else [given]
            found = [_option(question, item) for item in chosen]
            return None if None in found or not found else found
        case "choice":
            return _option(question, given)
        case "rating":
            whole = isinstance(given, int | float) and not isinstance(given, bool) and float(given).is_integer()
            return int(given) if whole and 1 <= given <= question.max else None
        case "boolean":
            return given if isinstance(given, bool) else None
        case "number":
            return given if isinstance(given, int | float) and not isinstance(given, bool) else None
        case "text":
            return given if isinstance(given, str) and given else None
        case "structured":
            return given


def _option(question: Question, given: Any) -> str | None:
    """The option that is meant: capitals and spaces about it do not matter, anything else does."""
    if not isinstance(given, str):
        return None
    folded = given.strip().casefold()
    return next((option for option in question.options if option.casefold() == folded), None)


def _control(schema: CurationSchema, question: Question) -> Control:
    if schema.label_config is None:
        return control_of(question, schema.rendering.about)
    return next(control for control in parse_controls(schema.label_config) if control.name == question.id)


def _region_value(question: Question, value: Any) -> dict[str, Any]:
    match question.type:
        case "choice":
            return {"choices": value if isinstance(value, list) else [value]}
        case "boolean" if len(question.choices) == 1:
            return {"choices": [question.choices[0]] if value else []}
        case "boolean":
            return {"choices": [question.choices[0] if value else question.choices[1]]}
        case "rating":
            return {"rating": value}
        case "number":
            return {"number": value}
        case "text":
            return {"text": [value]}
        case "structured":
            return {"text": [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)]}


def _value_of(question: Question, value: dict[str, Any]) -> Any:
    match question.type:
        case "choice":
            chosen = value.get("choices") or []
            return (chosen or None) if question.multiple else (chosen[0] if chosen else None)
        case "boolean":
            chosen = value.get("choices") or []
            if len(question.choices) == 1:
                return question.choices[0] in chosen
            return chosen[0] == question.choices[0] if chosen else None
        case "rating":
            return value.get("rating")
        case "number":
            return value.get("number")
        case "text":
            return _joined(value)
        case "structured":
            text = _joined(value)
            try:
                return None if text is None else json.loads(text)
            except ValueError:
                return text


def _joined(value: dict[str, Any]) -> str | None:
    text = value.get("text")
    if isinstance(text, list):
        return "\n".join(str(part) for part in text) if text else None
    return text
