"""Exports as a Dagster resource: each in a process of its own, so that one that hangs can be ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dagster import ConfigurableResource
from pydantic import Field

from resources.child import call_in_child
from resources.errors import ExportFailed
from resources.exports.rows import Written
from resources.exports.targets import SqlTarget
from resources.targets import load_targets


class ExportsResource(ConfigurableResource):  # type: ignore[type-arg]
    """Targets by name. No secret is part of it: they are read from the environment when they are needed."""

    data_root: str = Field(description="Folder that holds `batches/`.")
    targets_file: str = Field(description="The file that defines the targets.")

    def export(self, key: str, target: str, hear: Callable[[Any], None]) -> Written:
        """Export a batch to the target of that name.

        Raises:
            ExportFailed: there is none of that name (any more). ChildFailed: it did not take the results in time.
        """
        return self._call("export_batch", target, hear, key=key)

    def gold_star_tables(self) -> list[str]:
        """The targets that have a table for gold stars."""
        known = load_targets(Path(self.targets_file)).exports
        return [name for name, target in known.items() if isinstance(target, SqlTarget) and target.gold_stars_table]

    def export_gold_stars(self, reviews: str, target: str, hear: Callable[[Any], None]) -> Written:
        """Export the gold stars of a target of reviews; raises as `export`."""
        return self._call("export_gold_stars", target, hear, reviews=reviews)

    def _call(self, function: str, target: str, hear: Callable[[Any], None], **arguments: str) -> Written:
        known = load_targets(Path(self.targets_file)).exports
        if target not in known:
            raise ExportFailed(f"there is no such target in `exports` of {self.targets_file}")
        arguments |= {"data_root": self.data_root, "targets_file": self.targets_file, "target": target}
        result = call_in_child(
            f"resources.exports.export:{function}", arguments, silent_seconds=known[target].timeout, hear=hear
        )
        return Written(**result)
