"""Gold stars as training data: one folder a version, named by its content, that is never written again.

<data>/datasets/<target>/<format>/<version>/train.* validation.* card.json README.md
<data>/datasets/<target>/<format>/latest -> <version>

Formats: chat (OpenAI fine-tuning), icl (the best examples, to be shown in prompts), alpaca, input_output, dpo, raw.
The same stars make the same bytes, and so the same version. Which split an example is in follows from its prompt alone:
it does not move when others come or go.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.parquet as pq

from resources import durable
from resources.errors import CurationError
from resources.label_studio.annotations import AnnotationRow, to_table
from resources.label_studio.schema import CurationSchema

Format = Literal["chat", "icl", "alpaca", "input_output", "dpo", "raw"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT_VALIDATION_SHARE = 0.1
_BUCKETS = 10_000
_ROLES = ("system", "user", "assistant")

Record = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """A version that is there. `is_new` tells whether this call wrote it."""

    format: str
    version: str
    folder: Path
    train: int
    validation: int
    is_new: bool
    card: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class _Counts:
    gold_stars: int
    duplicates_removed: int
    left_out: int
    train: int
    validation: int


def write_dataset(
    root: Path,
    target: str,
    schema: CurationSchema,
    stars: Sequence[AnnotationRow],
    form: Format,
    validation_share: float = DEFAULT_VALIDATION_SHARE,
) -> Dataset:
    """Write the version of a format that these stars make, or find that it is there.

    Raises:
        CurationError: a template names a field that a star does not have; names the field and the star.
    """
    unique = without_duplicates(stars)
    train: list[AnnotationRow] = []
    validation: list[AnnotationRow] = []
    for star in _ordered(schema, unique, form):
        (validation if in_validation(star.prompt, validation_share) else train).append(star)
    suffix = "parquet" if form == "raw" else "jsonl"
    parent = root / target / form
    parent.mkdir(parents=True, exist_ok=True)
    durable.remove_temporaries(parent)
    made = durable.temporary_beside(parent / "made")
    made.mkdir()
    try:
        used: list[AnnotationRow] = []
        counts = {}
        for name, part in (("train", train), ("validation", validation)):
            kept = _write(made / f"{name}.{suffix}", schema, part, form)
            counts[name] = len(kept)
            used += kept
        digests = {path.name: _sha256(path) for path in sorted(made.iterdir())}
        numbers = _Counts(len(stars), len(stars) - len(unique), len(unique) - len(used), **counts)
        card = _card(target, schema, form, used, digests, numbers, validation_share)
        # Lineage is content too: the same words from another answer are another version.
        version = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()[:16]
        folder = parent / version
        is_new = not folder.exists()
        if is_new:
            durable.write_file(made / "card.json", json.dumps(card, indent=1, ensure_ascii=False).encode())
            durable.write_file(made / "README.md", _readme(card, version).encode())
            durable.publish_folder(made, folder)
        durable.point_link(parent / "latest", version)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Dataset(form, version, folder, counts["train"], counts["validation"], is_new, card)


def without_duplicates(stars: Sequence[AnnotationRow]) -> list[AnnotationRow]:
    """One star a prompt (with its system prompt and what was said before): the best rated, then the latest."""
    best: dict[tuple[str, str, str], AnnotationRow] = {}
    for star in sorted(stars, key=lambda star: (star.rating or 0.0, star.updated_at, star.annotation)):
        best[star.system, star.prompt, star.conversation] = star
    return sorted(best.values(), key=lambda star: (star.batch, star.line, star.annotation))


def in_validation(prompt: str, share: float) -> bool:
    """Whether an example is held back: by a hash of its prompt, the same on every machine and for ever."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % _BUCKETS
    return bucket < share * _BUCKETS


def fill(template: str, fields: dict[str, Any], where: str) -> str:
    """A template with its `{field}`s filled in. Braces that are no field are doubled: `{{`.

    Raises:
        CurationError: a field that is not there, by its name; or a template that is none.
    """
    try:
        return template.format_map(_Fields(fields))
    except KeyError as missing:
        names = ", ".join(sorted(fields))
        raise CurationError(
            f"{where}: the template has a field {{{missing.args[0]}}} that is not there; fields are {names}."
        ) from None
    except (ValueError, IndexError, AttributeError) as error:
        raise CurationError(f"{where}: the template {template[:80]!r} cannot be read: {error}") from None


class _Fields(dict[str, Any]):
    """Values as text, so that a template reaches into no object."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__({key: _as_text(value) for key, value in fields.items()})


def fields_of(star: AnnotationRow) -> dict[str, Any]:
    """What a template or a list of input and output fields may name."""
    return {
        **json.loads(star.values),
        "prompt": star.prompt,
        "system": star.system,
        "original_response": star.original_response,
        "final_response": star.final_response,
        "custom_id": star.custom_id,
        "model": star.model,
        "batch": star.batch,
        "line": star.line,
    }


# --- One record of each format


def _messages(schema: CurationSchema, star: AnnotationRow, answer: str | None) -> list[Record]:
    fields, where = fields_of(star), _where(star)
    system = star.system if schema.export.system is None else fill(schema.export.system, fields, where)
    user = fill(schema.export.user, fields, where)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [*_earlier(star), {"role": "user", "content": user}]
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def _earlier(star: AnnotationRow) -> list[Record]:
    """The turns before the prompt: without them, what is right here may be wrong."""
    turns = [turn for turn in json.loads(star.conversation) if turn["role"] not in ("system", "developer")]
    users = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return turns[: users[-1]] if users else []


def _chat(schema: CurationSchema, star: AnnotationRow) -> Record | None:
    """OpenAI's fine-tuning takes no empty message, and none of a tool without the call, which is not kept."""
    messages = _messages(schema, star, star.final_response)
    fits = all(message["content"].strip() and message["role"] in _ROLES for message in messages)
    return {"messages": messages} if fits else None


def _icl(schema: CurationSchema, star: AnnotationRow) -> Record | None:
    chat = _chat(schema, star)
    lineage = {key: getattr(star, key) for key in ("batch", "line", "custom_id", "model", "generation", "rating")}
    return chat and {**chat, "metadata": {**lineage, "edited": star.edited}}


def _alpaca(schema: CurationSchema, star: AnnotationRow) -> Record | None:
    """With a system prompt, that is the instruction and the prompt its input. Earlier turns have no place in it."""
    if _earlier(star):
        return None
    *before, user = _messages(schema, star, None)
    instruction, given = (before[0]["content"], user["content"]) if before else (user["content"], "")
    return {"instruction": instruction, "input": given, "output": star.final_response}


def _input_output(schema: CurationSchema, star: AnnotationRow) -> Record | None:
    fields = fields_of(star)
    names = schema.export.output_fields or ("final_response",)
    for name in schema.export.input_fields:
        if name not in fields:
            raise CurationError(f"{_where(star)}: `export.input_fields` names `{name}`, which is not there.")
    known = {*fields, *(question.id for question in schema.questions)}
    for name in names:
        if name not in known:
            raise CurationError(f"{_where(star)}: `export.output_fields` names `{name}`, which is not there.")
    return {
        "input": {name: fields[name] for name in schema.export.input_fields},
        "output": {name: fields.get(name) for name in names},
    }


def _dpo(schema: CurationSchema, star: AnnotationRow) -> Record | None:
    """Only where a person changed the answer: theirs is chosen, the model's rejected."""
    if not star.edited or star.final_response == star.original_response or not star.final_response:
        return None
    *before, user = _messages(schema, star, None)
    prompt = "\n\n".join([*(message["content"] for message in before), user["content"]])
    return {"prompt": prompt, "chosen": star.final_response, "rejected": star.original_response}


_RECORDS: dict[str, Callable[[CurationSchema, AnnotationRow], Record | None]] = {
    "chat": _chat,
    "icl": _icl,
    "alpaca": _alpaca,
    "input_output": _input_output,
    "dpo": _dpo,
}


def _ordered(schema: CurationSchema, stars: list[AnnotationRow], form: Format) -> list[AnnotationRow]:
    """For icl the best by rating, and only so many; else in the order of the batches."""
    if form != "icl":
        return stars
    best = sorted(stars, key=lambda star: (-(star.rating or 0.0), star.batch, star.line, star.annotation))
    return best[: schema.export.icl_examples]


def _write(path: Path, schema: CurationSchema, stars: list[AnnotationRow], form: Format) -> list[AnnotationRow]:
    """Write a split; the stars that are in it."""
    if form == "raw":
        pq.write_table(to_table(stars), path, compression="zstd")
        durable.sync_file(path)
        return stars
    used = []
    lines = []
    for star in stars:
        record = _RECORDS[form](schema, star)
        if record is not None:
            used.append(star)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    durable.write_file(path, "".join(lines).encode())
    return used


def _card(
    target: str,
    schema: CurationSchema,
    form: str,
    used: list[AnnotationRow],
    digests: dict[str, str],
    numbers: _Counts,
    share: float,
) -> dict[str, Any]:
    """What the dataset is. No time of making is in it, so that the same stars are the same version."""
    return {
        "format": form,
        "target": target,
        "schema": {"id": schema.id, "name": schema.name, "sha256": _digest(schema.model_dump_json().encode())},
        "counts": asdict(numbers),
        "validation_share": share,
        "models": _tally(star.model for star in used),
        "batches": _tally(star.batch for star in used),
        "edited": sum(star.edited for star in used),
        "sha256": digests,
        "lineage": [
            {
                "batch": star.batch,
                "line": star.line,
                "model": star.model,
                "generation": star.generation,
                "task": star.task,
                "annotation": star.annotation,
            }
            for star in used
        ],
    }


def _readme(card: dict[str, Any], version: str) -> str:
    counts = card["counts"]
    lines = [
        f"# Gold stars of {card['target']}, as {card['format']}",
        "",
        f"Version `{version}`. Reviewed with the schema `{card['schema']['id']}` ({card['schema']['name']}).",
        "",
        f"- {counts['train']} examples to train on, {counts['validation']} held back",
        f"- of {counts['gold_stars']} gold stars; {counts['duplicates_removed']} with the prompt of another one and "
        f"{counts['left_out']} that this format has no use for are left out",
        f"- {card['edited']} changed by a reviewer",
        *(f"- {count} answered by {model or 'an unknown model'}" for model, count in card["models"].items()),
        *(f"- from batch {batch}: {count}" for batch, count in card["batches"].items()),
        "",
        *(f"- `{name}`: sha256 `{digest}`" for name, digest in card["sha256"].items()),
        "",
        "`card.json` has the batch, line, model, generation, task and annotation of every example, in their order.",
    ]
    return "\n".join(lines) + "\n"


def _tally(names: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def _where(star: AnnotationRow) -> str:
    return f"gold star of batch {star.batch}, line {star.line}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sha256(path: Path) -> str:
    return _digest(path.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
