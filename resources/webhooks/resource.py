"""Webhooks as a Dagster resource. Its config holds no target: URLs and secrets are read where they are used."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from dagster import ConfigurableResource
from pydantic import Field

from resources.batch_store.batch import Batch
from resources.progress import Progress, ProgressCallback, silent
from resources.settings import settings
from resources.targets import all_targets
from resources.webhooks.batch_events import in_progress
from resources.webhooks.deliveries import Deliveries

log = logging.getLogger(__name__)


class WebhooksResource(ConfigurableResource):  # type: ignore[type-arg]
    """Deliveries to the targets that are defined now."""

    data_root: str = Field(description="Folder that holds `webhooks/`: the outbox and the dead letters.")
    enabled: bool = Field(False, description="Whether events are sent at all.")

    def deliveries(self) -> Deliveries:
        """
        Raises:
            SettingsError: the targets cannot be read.
        """
        return Deliveries(Path(self.data_root), all_targets(settings()).webhooks)

    def progress_announcer(
        self, batch: Batch, run_id: str, clock: Callable[[], float] = time.monotonic
    ) -> ProgressCallback:
        """Leaves `batch.progress` in the outbox for the targets that ask for it, each as often as it says.

        Best effort: whatever fails here, the work goes on.
        """
        if not self.enabled:
            return silent
        try:
            deliveries = self.deliveries()
            targets = deliveries.hearing("batch.progress", batch.spec.options)
        except Exception as error:
            log.warning("%s: progress is not sent to webhooks: %s", batch.key, error)
            return silent
        last = dict.fromkeys((target.name for target in targets), clock())

        def tell(now: Progress) -> None:
            due = [target for target in targets if clock() - last[target.name] >= target.progress_seconds]
            if not due or now.note:
                return
            last.update(dict.fromkeys((target.name for target in due), clock()))
            try:
                deliveries.announce(in_progress(batch, run_id, now, datetime.now(UTC)), due)
            except Exception as error:
                log.warning("%s: progress could not be left for webhooks: %s", batch.key, error)

        return tell if targets else silent
