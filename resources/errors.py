"""Every error of the engine room, so that a caller sees at a glance what to catch.

BatchError                      what a person can do something about; the message says what, where and how
  SettingsError                 a setting or an option that does not fit
    CatalogError                models.yaml
    OptionsError                the options of a batch (sidecar, --option)
    HandlerRefused              classes of the earlier plug-in interface that cannot be used; carries which
  InputRefused                  a file that cannot be registered as a batch
  BatchNotFound                 no batch is registered under that key
  BatchLocked                   another process works on that batch just now
  BatchFailed                   the batch cannot complete, however often it is run; recorded in its folder
  BatchStopped                  interrupted or cancelled; what is committed stays
  EngineError
    EngineStartFailed           the engine did not come up; carries the last lines of its log
    EngineDown                  the engine went away and stayed away; uncommitted rows are asked again by the next run
  DeliveryFailed                events that their webhook did not take; they are among the dead letters
  CheckpointError               a chunk or spec that cannot be what it should be
    ChunkDamaged                one chunk is not as it was written; the next run sets it aside and asks its lines again
  StorageError                  the disk refused: full, read-only, no right to write
  ExportFailed                  a target did not take the results; another run exports what is missing
  ChildFailed                   work in a process of its own failed, ended or was silent for too long
  CurationError                 reviewing in Label Studio, gold stars and their datasets
    LabelStudioRefused          the server understood and said no: a token, a permission, a value; carries the status
    LabelStudioDown             not reached, or in trouble, for all the tries; what was done is kept and found again
      ReplyLost                 a request that must not be repeated blindly was sent, and how it ended is not known
"""

from collections.abc import Sequence
from typing import Any, TypedDict


class BatchError(Exception):
    """Base of the errors that are for people."""


class SettingsError(BatchError):
    pass


class CatalogError(SettingsError):
    pass


class OptionsError(SettingsError):
    pass


class HandlerRefused(SettingsError):
    """``paths`` are those of the classes that are to blame, as the setting has them."""

    def __init__(self, message: str, *paths: str) -> None:
        super().__init__(message)
        self.paths = paths


class InputRefused(BatchError):
    pass


class BatchNotFound(BatchError):
    pass


class BatchLocked(BatchError):
    pass


class LineError(TypedDict):
    """One of the errors of a batch that cannot run, as OpenAI's Batch API writes them."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchFailed(BatchError):
    """Deterministic: the same input fails the same way. ``code`` is one word for machines.

    ``errors`` is what OpenAI's Batch API has under that name: ``{"object": "list", "data": [...]}``, the first lines
    that are to blame, or the failure itself where no line is.
    """

    def __init__(self, code: str, message: str, lines: Sequence[LineError] = ()) -> None:
        super().__init__(message)
        self.code = code
        whole: LineError = {"code": code, "message": message, "param": None, "line": None}
        self.errors: dict[str, Any] = {"object": "list", "data": [*lines] or [whole]}


class BatchStopped(BatchError):
    pass


class EngineError(BatchError):
    pass


class EngineStartFailed(EngineError):
    pass


class EngineDown(EngineError):
    pass


class DeliveryFailed(BatchError):
    pass


class CheckpointError(BatchError):
    pass


class ChunkDamaged(CheckpointError):
    pass


class StorageError(BatchError):
    pass


class ExportFailed(BatchError):
    pass


class ChildFailed(BatchError):
    pass


class CurationError(BatchError):
    pass


class LabelStudioRefused(CurationError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class LabelStudioDown(CurationError):
    pass


class ReplyLost(LabelStudioDown):
    pass
