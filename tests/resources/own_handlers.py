"""Handlers as people wrote them for the earlier interface. What they did, they note in the folder HANDLER_NOTES."""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Plain:
    """Notes what it was given."""

    def name(self) -> str:
        return type(self).__name__

    def enabled(self, metadata: dict[str, Any]) -> bool:
        return metadata.get("team") != "nobody"

    def handle(self, batch_id: str, results: Iterable[dict[str, Any]], metadata: dict[str, Any]) -> bool:
        ids = [row["custom_id"] for row in results]
        again = [row["custom_id"] for row in results]
        self.note(batch=batch_id, ids=ids, again=ids == again, count=len(results), metadata=metadata)  # type: ignore[arg-type]
        return True

    def on_error(self, batch_id: str, error: Exception) -> None:
        self.note(batch=batch_id, error=repr(error))

    def note(self, **content: Any) -> None:
        path = Path(os.environ["HANDLER_NOTES"]) / f"{self.name()}.{time.time_ns()}.json"
        path.write_text(json.dumps(content))


class Report(Plain):
    def after(self) -> list[str]:
        return ["Plain"]


class Raises(Plain):
    def handle(self, batch_id: str, results: Any, metadata: dict[str, Any]) -> bool:
        raise RuntimeError("the archive is full")


class SaysNo(Plain):
    def handle(self, batch_id: str, results: Any, metadata: dict[str, Any]) -> bool:
        return False


class Forgets(Plain):
    def handle(self, batch_id: str, results: Any, metadata: dict[str, Any]) -> None:  # type: ignore[override]
        pass


class Hangs(Plain):
    def handle(self, batch_id: str, results: Any, metadata: dict[str, Any]) -> bool:
        if (Path(os.environ["HANDLER_NOTES"]) / "mended").exists():
            return super().handle(batch_id, results, metadata)
        time.sleep(600)
        return True


class AfterHangs(Plain):
    def after(self) -> list[str]:
        return ["Hangs"]


class First(Plain):
    def after(self) -> list[str]:
        return ["Second"]


class Second(Plain):
    def after(self) -> list[str]:
        return ["First"]


class Strange:
    def name(self) -> str:
        return "Strange"


class Twin(Plain):
    def name(self) -> str:
        return "plain"


class Breaks:
    def __init__(self) -> None:
        raise OSError("no licence")
