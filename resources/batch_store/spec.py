"""What a batch is: the content of `batch.json`."""

import hashlib
import json
import re
import unicodedata
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from resources.batch_format.options import BatchOptions

FORMAT_VERSION = 1
KEY_PATTERN = re.compile(r"^[a-z0-9](?:[a-z0-9_-]{0,58}[a-z0-9])?-[0-9a-f]{8}$")


class BatchSpec(BaseModel):
    """`identity` is the full hash behind the key: the input's bytes and the options that change answers.

    `lines` counts line ends of a plain file; None for a compressed one until it is checked.
    `engine` is "null" for a dry run, which is a batch of its own and so never meets real answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    key: str
    identity: str
    source_name: str
    suffix: str
    sha256: str
    size: int
    lines: int | None
    engine: Literal["null"] | None = None
    options: BatchOptions
    registered_at: datetime


def identity_of(sha256: str, suffix: str, options: BatchOptions, engine: str | None) -> str:
    """Full hash of what decides the answers of a batch."""
    decisive = {"sha256": sha256, "suffix": suffix, "engine": engine, **options.answer_changing()}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def key_of(source_name: str, suffix: str, identity: str) -> str:
    """`<slug of the stem>-<8 hex digits>`: safe in a path, a URL and a partition key."""
    stem = source_name[: -len(suffix)] if source_name.lower().endswith(suffix) else source_name
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9_]+", "-", ascii_stem)[:60].strip("-_") or "batch"
    return f"{slug}-{identity[:8]}"


def is_key(text: str) -> bool:
    """Whether a text has the form of a batch key. Checked before any path is built from it."""
    return len(text) <= 80 and KEY_PATTERN.fullmatch(text) is not None
