"""The batch store as a Dagster resource: it holds the lock of the run's batch from the first asset to the end."""

from contextlib import ExitStack
from pathlib import Path

from dagster import ConfigurableResource, InitResourceContext
from pydantic import Field, PrivateAttr

from resources.batch_store.batch import Batch
from resources.batch_store.store import BatchStore


class BatchStoreResource(ConfigurableResource):  # type: ignore[type-arg]
    """Batches by partition key. `lock` is taken once a run and dropped when the run ends, however it ends: a run that
    Dagster believes to be going on, but whose batch is free, is one whose process is gone."""

    data_root: str = Field(description="Folder that holds `batches/`; a local file system.")

    _held: ExitStack = PrivateAttr(default_factory=ExitStack)
    _locked: dict[str, Batch] = PrivateAttr(default_factory=dict)

    def store(self) -> BatchStore:
        return BatchStore(Path(self.data_root))

    def lock(self, key: str, run_id: str) -> Batch:
        """The batch of a key, locked for this run.

        Raises:
            BatchNotFound: nothing is registered under the key; BatchLocked: another process works on it.
        """
        if key not in self._locked:
            batch = self.store().get(key)
            self._held.enter_context(batch.lock(f"Dagster run {run_id[:8]}"))
            self._locked[key] = batch
        return self._locked[key]

    def setup_for_execution(self, context: InitResourceContext) -> None:
        self._held, self._locked = ExitStack(), {}

    def teardown_after_execution(self, context: InitResourceContext) -> None:
        self._held.close()
        self._locked = {}
