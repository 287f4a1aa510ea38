"""The options of a batch: the sidecar `<stem>.yaml` beside a dropped file, and `--option k=v` on the command line."""

import difflib
import json
import re
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from resources.batch_format.lines import input_suffix, open_regular
from resources.errors import OptionsError

MAX_SIDECAR_BYTES = 256 * 1024
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(s|m|h|d)$")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Order = Literal["input", "prefix", "longest_first"]


class BatchOptions(BaseModel):
    """How one batch is to be processed. Unknown keys and wrong types are refused with the key named."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, min_length=1, description="Replaces body.model in every line.")
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="Body fields for lines that do not set them, such as temperature."
    )
    on_invalid: Literal["quarantine", "reject"] = Field(
        "quarantine", description="quarantine: bad lines become error rows; reject: any bad line fails the batch."
    )
    chunk_rows: int = Field(1000, ge=1, le=100_000, description="Rows of a committed chunk.")
    flush_seconds: float = Field(5, gt=0, le=3600, description="Commit at the latest after this many seconds.")
    max_attempts: int = Field(
        3, ge=1, le=20, description="Times a request is sent before a transient fault is its answer."
    )
    request_timeout: float = Field(600, gt=0, le=86_400, description="Seconds a request may take.")
    order: Order = Field(
        "input", description="What is asked next, within a window of lines. The outputs are in input order always."
    )
    dedupe: bool = Field(False, description="Ask identical deterministic requests once; every line gets its own row.")
    deadline: str | None = Field(
        None, description="Stop asking after this: `90m`, `24h`, `7d` from registration, or an ISO time with zone."
    )
    priority: Literal[-1, 0, 1] = Field(0, description="Priority in the run queue.")
    metadata: dict[str, str] = Field(default_factory=dict, description="Carried to the outputs.")

    @field_validator("defaults")
    @classmethod
    def _not_in_defaults(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "model" in value:
            raise ValueError("`model` is an option of its own")
        if value.get("stream"):
            raise ValueError("`stream` is not supported in a batch")
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False, sort_keys=True).encode()
        except (TypeError, ValueError, RecursionError):
            raise ValueError("must hold what JSON can say: no dates, sets, NaN or keys that are not text") from None
        return value

    @field_validator("deadline", mode="before")
    @classmethod
    def _yaml_time(cls, value: object) -> object:
        """An ISO time that stands in YAML without quotes comes as a datetime."""
        return value.isoformat() if isinstance(value, date) else value

    @field_validator("deadline")
    @classmethod
    def _deadline_is_a_time(cls, value: str | None) -> str | None:
        if value is not None:
            _deadline(value, datetime.now(UTC))
        return value

    def deadline_at(self, registered_at: datetime) -> datetime | None:
        """The moment after which nothing more is asked, in UTC."""
        return None if self.deadline is None else _deadline(self.deadline, registered_at)

    def answer_changing(self) -> dict[str, Any]:
        """The options that change what is answered, and so are part of a batch's key."""
        return {"model": self.model, "defaults": self.defaults}


def parse_options(values: dict[str, Any], origin: str) -> BatchOptions:
    """Check a mapping of options.

    Raises:
        OptionsError: names `origin`, the key and what is wrong with it.
    """
    try:
        options = BatchOptions(**values)
        options.model_dump_json()
        return options
    except ValueError as error:
        if not isinstance(error, ValidationError):  # a lone surrogate somewhere
            raise OptionsError(f"{origin}: a text is not Unicode: {error}") from None
        raise OptionsError(f"{origin}: " + "; ".join(_explain(e) for e in error.errors())) from None


def sidecar_path(input_path: Path) -> Path:
    """`<stem>.yaml` beside an input file."""
    suffix = input_suffix(input_path) or input_path.suffix
    return input_path.with_name(input_path.name[: len(input_path.name) - len(suffix)] + ".yaml")


def load_sidecar(input_path: Path) -> dict[str, Any]:
    """The options in `<stem>.yaml` beside an input file; empty where there is none.

    Raises:
        OptionsError: not a small regular YAML file with a mapping.
    """
    path = sidecar_path(input_path)
    if not path.is_symlink() and not path.exists():
        return {}
    with open_regular(path) as stream:
        text = stream.read(MAX_SIDECAR_BYTES + 1)
    if len(text) > MAX_SIDECAR_BYTES:
        raise OptionsError(f"{path}: larger than {MAX_SIDECAR_BYTES} bytes.")
    values = _load_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise OptionsError(f"{path}: must hold a mapping of option to value.")
    return values


def _load_yaml(text: bytes, origin: str) -> Any:
    try:
        return yaml.load(text.decode("utf-8"), Loader=SidecarLoader)
    except Exception as error:  # tags such as `!!int ""` raise whatever their constructor happens to
        raise OptionsError(f"{origin}: not readable as YAML: {error}") from None


def options_from_text(pairs: list[str]) -> dict[str, Any]:
    """Options of the form `key=value` from a command line; values are read as YAML, so `{temperature: 0}` works."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise OptionsError(f"--option {pair}: must be key=value, for example --option chunk_rows=500.")
        values[key.strip()] = _load_yaml(text.encode("utf-8", "surrogateescape"), f"--option {key}")
    return values


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, without keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"key `{twice[0]}` stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)


class SidecarLoader(UniqueKeyLoader):
    """For files that anybody may drop: without aliases too, which can blow a small file up."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


def _deadline(text: str, start: datetime) -> datetime:
    match = _DURATION.match(text.strip())
    if match:
        try:
            return start + timedelta(seconds=float(match[1]) * _UNIT_SECONDS[match[2]])
        except OverflowError:
            raise ValueError("is further away than a calendar reaches; leave it out for none") from None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be a duration such as 90m, 24h, 7d, or an ISO time with a zone") from None
    if moment.tzinfo is None:
        raise ValueError("an absolute time needs a zone, for example 2026-12-01T06:00:00+00:00")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time that has a UTC form") from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, BatchOptions.model_fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"options are {', '.join(BatchOptions.model_fields)}."
        return f"unknown option `{key}`; {hint}"
    return f"option `{key}`: {error['msg'].removeprefix('Value error, ')}"
