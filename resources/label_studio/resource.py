"""Label Studio as a Dagster resource: clients and folders by the name of a target. Reads settings when it is asked."""

from pathlib import Path

from dagster import ConfigurableResource
from pydantic import Field

from resources.batch_store.batch import Batch
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import Connection, connection_of, target_names, target_of
from resources.label_studio.reviews import Reviews, open_reviews
from resources.settings import settings
from resources.targets import load_targets


class LabelStudioResource(ConfigurableResource):  # type: ignore[type-arg]
    """The Label Studio projects of the targets file and the settings. Holds no secret itself, so none is in run config:
    tokens are read from the environment when a connection is made."""

    data_root: str = Field(description="Data root: `curation/` and `datasets/` are in it.")

    def targets(self) -> list[str]:
        return target_names(settings(), load_targets(settings().targets_file))

    def target_of(self, batch: Batch) -> str | None:
        """The target that a batch is reviewed in; None where it is not."""
        return target_of(batch.spec.options, settings())

    def connection(self, target: str) -> Connection:
        return connection_of(target, settings(), load_targets(settings().targets_file))

    def client(self, connection: Connection) -> LabelStudioClient:
        return LabelStudioClient(connection)

    def reviews(self, target: str) -> Reviews:
        return open_reviews(Path(self.data_root), target)

    @property
    def datasets_dir(self) -> Path:
        return Path(self.data_root) / "datasets"
