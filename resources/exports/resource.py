"""Exports as a Dagster resource: each in a process of its own, so that one that hangs can be ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dagster import ConfigurableResource
from pydantic import Field

from resources.child import call_in_child
from resources.errors import ExportFailed
from resources.exports.rows import Written
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
        known = load_targets(Path(self.targets_file)).exports
        if target not in known:
            raise ExportFailed(f"there is no such target in `exports` of {self.targets_file}")
        arguments = {"data_root": self.data_root, "targets_file": self.targets_file, "key": key, "target": target}
        function = "resources.exports.export:export_batch"
        result = call_in_child(function, arguments, silent_seconds=known[target].timeout, hear=hear)
        return Written(**result)
