"""The story of an export: a batch's latest outputs, or gold stars, to one target, however often it was broken off."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.child import Tell
from resources.errors import SettingsError
from resources.exports.gold_stars import rows_of
from resources.exports.object_store import export_files
from resources.exports.published import Published
from resources.exports.rows import Written
from resources.exports.sql import export_rows
from resources.exports.targets import ExportTarget, ObjectStoreTarget, SqlTarget
from resources.label_studio.reviews import open_reviews
from resources.targets import load_targets


def export_batch(tell: Tell, data_root: str, targets_file: str, key: str, target: str) -> dict[str, Any]:
    """What runs in a process of its own. It reads the target itself, so that no secret goes by a pipe."""
    return asdict(export_latest(_target(targets_file, target), BatchStore(Path(data_root)).get(key), tell))


def export_gold_stars(tell: Tell, data_root: str, targets_file: str, reviews: str, target: str) -> dict[str, Any]:
    """The same for the gold stars of a target of reviews, into the `gold_stars_table` of a database."""
    found = _target(targets_file, target)
    if not isinstance(found, SqlTarget) or found.gold_stars_table is None:
        raise SettingsError(f"target `{target}` in `exports` of {targets_file} has no `gold_stars_table`")
    table = found.model_copy(update={"table": found.gold_stars_table})
    return asdict(export_rows(table, rows_of(open_reviews(Path(data_root), reviews)), tell))


def export_latest(target: ExportTarget, batch: Batch, tell: Tell) -> Written:
    """Export the latest revision; the one that takes its place meanwhile, if one does.

    Raises:
        BatchError: nothing is published yet; ExportFailed: the target did not take it.
    """
    while True:
        published = Published.of(batch)
        try:
            return export_published(target, published, tell)
        except FileNotFoundError:
            if published.is_latest_of(batch):
                raise
            tell(f"{batch.key}: a newer revision was published; it is exported instead")


def export_published(target: ExportTarget, published: Published, tell: Tell) -> Written:
    if isinstance(target, ObjectStoreTarget):
        return export_files(target, published, tell)
    return export_rows(target, published.rows(), tell)


def _target(targets_file: str, name: str) -> ExportTarget:
    targets = load_targets(Path(targets_file)).exports
    if name not in targets:
        raise SettingsError(f"no target `{name}` in `exports` of {targets_file}")
    return targets[name]
