"""Which batches wait for another model to be done: as few loads as can be, and nothing starves.

A batch for a model that must be loaded first would only take a slot and wait in it while others use the devices. So the
models that are being run, and those that are warm, come first; another one's batches wait until these are through, and
no longer than HELD_SECONDS: then they are started whatever is warm, and the queue at the devices (first come, first
served) gives them their turn.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from resources import pipeline
from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, EngineKind
from resources.engine.factory import EngineStarter
from resources.errors import BatchError

HELD_SECONDS = 600


class Plan:
    """The models whose turn it is: those that are run now, then warm ones and then any that are asked for, oldest
    first, as many as the devices hold.

    Args:
        running: keys of batches that are run now, or queued for it.
        waiting: keys of batches that are to be started, oldest first.
    """

    def __init__(
        self,
        store: BatchStore,
        catalog: Catalog,
        engines: EngineStarter,
        running: Iterable[str],
        waiting: Iterable[str],
    ) -> None:
        self._store, self._catalog = store, catalog
        wanted = [model for key in waiting for model in self._servers_of(key)]
        warm = engines.warm([catalog.get(model) for model in dict.fromkeys(wanted)])
        now = dict.fromkeys(model for key in running for model in self._servers_of(key))
        free = engines.devices - sum(catalog.get(model).devices_needed for model in now)
        for model in sorted(dict.fromkeys(wanted), key=lambda model: model not in warm):
            needs = catalog.get(model).devices_needed
            if model not in now and (free >= needs or not now):
                now[model] = None
                free -= needs
        self.models = list(now)

    def reason_to_wait(self, batch: Batch, since: datetime) -> str | None:
        """Why a batch is better not started now; None where it is its turn."""
        models = self._servers_of(batch.key)
        waited = (datetime.now(UTC) - since).total_seconds()
        if not models or waited > HELD_SECONDS or not models.isdisjoint(self.models):
            return None
        return f"waits for the batches of {', '.join(self.models)}, {(HELD_SECONDS - waited) / 60:.0f} min at most"

    def _servers_of(self, key: str) -> set[str]:
        """The models of a batch that take a device."""
        try:
            entries = pipeline.models_of(self._store.get(key), self._catalog)
        except BatchError:
            return set()
        return {entry.server_entry.name for entry in entries if entry.engine is EngineKind.VLLM}
