"""Engines and the model catalog as a Dagster resource. Nothing is started in its set-up: engines start when asked."""

from pathlib import Path

from dagster import ConfigurableResource
from pydantic import Field

from resources.engine.catalog import Catalog, load_catalog
from resources.engine.factory import EngineStarter


class EngineResource(ConfigurableResource):  # type: ignore[type-arg]
    """What answers requests."""

    models_file: str = Field(description="The model catalog, models.yaml.")
    runtime_dir: str = Field(description="Private folder for sockets and device locks.")
    log_dir: str = Field(description="Folder for the logs of vLLM servers that we own.")

    def catalog(self) -> Catalog:
        """The catalog as it is now; read at every call, so that an edit needs no restart."""
        return load_catalog(Path(self.models_file))

    def starter(self, who: str) -> EngineStarter:
        """`who` is what others are told about who uses a server."""
        return EngineStarter(Path(self.runtime_dir), Path(self.log_dir), who)
