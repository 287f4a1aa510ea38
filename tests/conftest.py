"""The world of a test: a data root of its own, and one real Dagster instance on a real PostgreSQL for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance

from resources.label_studio import local_server
from tests.helpers import World, new_instance, new_world
from tests.reviewing import Reviewing


@pytest.fixture(scope="session")
def instance() -> Iterator[DagsterInstance]:
    """Shared: a test sees the runs and partitions of others, and nothing of their files."""
    with new_instance() as made:
        yield made


@pytest.fixture
def world(tmp_path: Path, instance: DagsterInstance) -> Iterator[World]:
    """An empty data root with an inbox and a catalog, and the settings that point there."""
    with new_world(tmp_path, instance) as made:
        yield made


@pytest.fixture(scope="session")
def label_studio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_server.Server]:
    """A real Label Studio with an empty database. Shared: each test has a project of its own."""
    local_server.install()
    folder = tmp_path_factory.mktemp("label-studio") / "data"
    local_server.copy_of_empty(folder)
    with local_server.running(folder) as server:
        yield server


@pytest.fixture
def reviewing(tmp_path: Path, label_studio_server: local_server.Server) -> Reviewing:
    """A project of the test's own on the real server, reviewed by the schema `generic`."""
    return Reviewing(label_studio_server, tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """What the shell of a developer sets has no say in a test."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [*os.environ]:
            if name.startswith("VLLM_BATCH_") or name in ("DAGSTER_HOME", "DAGSTER_POSTGRES_URL"):
                environment.delenv(name)
        yield
