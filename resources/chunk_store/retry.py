"""Which answered lines a retry asks again."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from resources.errors import OptionsError


class FailureKind(StrEnum):
    """errors: lines without an answer, or refused. truncated: answers cut by max_tokens. schema: answers that do not
    fit the JSON schema they were asked to fit."""

    ERRORS = "errors"
    TRUNCATED = "truncated"
    SCHEMA = "schema"


Failures = frozenset[FailureKind]
ERRORS: Failures = frozenset({FailureKind.ERRORS})


def failures_of(names: Iterable[str]) -> Failures:
    """Raises OptionsError: one is unknown, or there is none; says what there is."""
    given = [name.strip() for name in names]
    known = [str(failure) for failure in FailureKind]
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        raise OptionsError(f"failed: {', '.join(wrong) or 'nothing'!r} is none of {', '.join(known)}.")
    return frozenset(FailureKind(name) for name in given)


@dataclass(frozen=True)
class Retry:
    """Ask again the lines whose latest row is one of `failures`. `begun_at` (microseconds since 1970) is that of a
    retry which is gone on with: younger rows are left alone, since it has asked them already."""

    failures: Failures
    begun_at: int | None = None

    @property
    def columns(self) -> list[str]:
        """What `chooses` reads of a chunk besides its status."""
        more = {FailureKind.TRUNCATED: ["finish_reason"], FailureKind.SCHEMA: ["fits_schema"]}
        since = [] if self.begun_at is None else ["finished_at"]
        return [*since, *(name for failure in sorted(self.failures) for name in more.get(failure, []))]

    def chooses(self, rows: pa.Table, failed: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which rows of a chunk are to be asked again; `failed` tells which have no answer."""
        chosen = np.zeros(len(rows), np.bool_)
        if FailureKind.ERRORS in self.failures:
            chosen |= failed
        if FailureKind.TRUNCATED in self.failures:
            chosen |= _is(rows, "finish_reason", "length") & ~failed
        if FailureKind.SCHEMA in self.failures:
            chosen |= _is(rows, "fits_schema", False)
        if self.begun_at is not None:
            chosen &= rows["finished_at"].cast(pa.int64()).to_numpy() < self.begun_at
        return chosen


def _is(rows: pa.Table, name: str, value: object) -> npt.NDArray[np.bool_]:
    if name not in rows.column_names:  # a chunk from before the column was
        return np.zeros(len(rows), np.bool_)
    found: npt.NDArray[np.bool_] = pc.fill_null(pc.equal(rows[name], value), False).to_numpy()
    return found
