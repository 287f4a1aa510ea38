"""Curation schemas: how a result is reviewed. YAML files; two are shipped in `schemas/` beside this module.

`data_sources` is what the reviewer reads (fields of the task's data), `questions` what they answer, `rendering` which
of the sources the answers are about, `export` what datasets are made of. A question's answer by the model is the field
of the same name in its JSON answer (`source: answer`), the whole answer as text (`source: response`), or none.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resources.batch_format.options import UniqueKeyLoader
from resources.errors import SettingsError

SHIPPED = Path(__file__).with_name("schemas")
ID_PATTERN = r"^[A-Za-z][A-Za-z0-9_]{0,63}$"
YES, NO = "Yes", "No"

QuestionType = Literal["choice", "rating", "boolean", "text", "number", "structured"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class DataSource(_Part):
    """A field of the task's data that reviewers read."""

    field: str = Field(pattern=ID_PATTERN)
    title: str = ""
    kind: Literal["text", "conversation"] = "text"
    collapsed: bool = False


class Question(_Part):
    """What a reviewer answers, and where the model's own answer to it stands."""

    id: str = Field(pattern=ID_PATTERN)
    type: QuestionType
    title: str = ""
    hint: str = ""
    options: tuple[str, ...] = ()
    required: bool = False
    multiple: bool = Field(False, description="Of a choice: several options at once.")
    max: int = Field(5, ge=2, le=10, description="Of a rating: the best one; the worst is 1.")
    rows: int = Field(4, ge=1, le=40, description="Of a text: height of its box.")
    source: Literal["answer", "response", "none"] = "answer"

    @model_validator(mode="after")
    def _options_fit_the_type(self) -> Self:
        if self.type == "choice" and len(self.options) < 2:
            raise ValueError(f"question `{self.id}`: a choice needs two options or more")
        if self.type not in ("choice", "boolean") and self.options:
            raise ValueError(f"question `{self.id}`: a {self.type} has no options")
        if self.type == "boolean" and len(self.options) > 2:
            raise ValueError(f"question `{self.id}`: a boolean has one option (to tick) or two (yes, no)")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"question `{self.id}`: an option stands twice")
        if self.source == "response" and self.type not in ("text", "structured"):
            raise ValueError(f"question `{self.id}`: `source: response` is for text")
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        """What can be ticked."""
        return self.options or ((YES, NO) if self.type == "boolean" else ())


class Rendering(_Part):
    about: str = Field("response", description="The data source that the questions are about.")
    score: bool = Field(False, description="Give predictions a score: the mean probability of the answer's tokens.")


class Export(_Part):
    """What stars and datasets are made of."""

    gold: str | None = Field(None, description="The boolean question that makes an annotation a gold star.")
    final: str | None = Field(None, description="The text question that is the final answer. Default: a JSON object.")
    rating: str | None = Field(None, description="The rating that examples are ordered by. Default: the mean of all.")
    input_fields: tuple[str, ...] = Field(("prompt",), alias="inputFields")
    output_fields: tuple[str, ...] = Field((), alias="outputFields")
    user: str = Field("{prompt}", description="Template of the user's message.")
    system: str | None = Field(None, description="Template of the system message. Default: the one of the request.")
    icl_examples: int = Field(50, ge=1, le=10_000, description="How many examples the format icl takes.")


class CurationSchema(_Part):
    """A schema as it stands in its file. Unknown keys are refused, and so is a question that refers to nothing."""

    id: str = Field(pattern=ID_PATTERN)
    name: str
    description: str = ""
    data_sources: tuple[DataSource, ...] = Field(min_length=1)
    questions: tuple[Question, ...] = Field(min_length=1)
    rendering: Rendering = Rendering()
    export: Export = Export()
    label_config: str | None = Field(None, description="A label config of one's own instead of the generated one.")

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        fields = [source.field for source in self.data_sources]
        names = [question.id for question in self.questions]
        for name in {name for name in fields + names if (fields + names).count(name) > 1}:
            raise ValueError(f"`{name}` stands twice among data sources and questions")
        if self.rendering.about not in fields:
            raise ValueError(f"`rendering.about`: no data source `{self.rendering.about}`")
        wanted = {"gold": "boolean", "final": "text", "rating": "rating"}
        for key, kind in wanted.items():
            name = getattr(self.export, key)
            if name is not None and (name not in names or self.question(name).type != kind):
                raise ValueError(f"`export.{key}`: no {kind} question `{name}`")
        return self

    def question(self, name: str) -> Question:
        return next(question for question in self.questions if question.id == name)

    @cached_property
    def answered(self) -> tuple[Question, ...]:
        """The questions that the model answers in its JSON object."""
        return tuple(question for question in self.questions if question.source == "answer")

    def response_format(self) -> dict[str, Any]:
        """`response_format` for a request: answers that fit it are what reviewers see filled in."""
        if not self.answered:
            return {"type": "text"}
        properties = {question.id: _json_schema(question) for question in self.answered}
        # Strict mode asks for all properties to be required; one that may be left out is one that may be null.
        for question in self.answered:
            if not question.required:
                properties[question.id] = {"anyOf": [properties[question.id], {"type": "null"}]}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": self.id, "strict": True, "schema": schema}}


def _json_schema(question: Question) -> dict[str, Any]:
    described = {"description": question.title} if question.title else {}
    match question.type:
        case "choice" if question.multiple:
            return {"type": "array", "items": {"type": "string", "enum": list(question.options)}, **described}
        case "choice":
            return {"type": "string", "enum": list(question.options), **described}
        case "rating":
            return {"type": "integer", "minimum": 1, "maximum": question.max, **described}
        case "boolean":
            return {"type": "boolean", **described}
        case "number":
            return {"type": "number", **described}
        case "text":
            return {"type": "string", **described}
        case "structured":
            return {"type": "object", **described}


def load_schema(name: str) -> CurationSchema:
    """A shipped schema by its name, or one's own by the path of its YAML file.

    Raises:
        SettingsError: no such schema, or it does not fit; names the file and the key.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    path = SHIPPED / f"{name}.yaml" if name in shipped else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise SettingsError(
            f"No curation schema `{name}`: there are {', '.join(shipped)}, or the path of a .yaml file."
        )
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
        return CurationSchema.model_validate(document)
    except FileNotFoundError:
        raise SettingsError(f"The curation schema {path} is not there; shipped ones: {', '.join(shipped)}.") from None
    except ValidationError as error:
        raise SettingsError(f"{path}: " + "; ".join(_explain(e) for e in error.errors())) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} is not readable as YAML: {error}") from None


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"`{where}`: {error['msg'].removeprefix('Value error, ')}" if where else str(error["msg"])
