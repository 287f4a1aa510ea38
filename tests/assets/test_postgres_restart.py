"""Dagster's database goes away in the middle of a run: the work goes on."""

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance

from resources.postgres import EmbeddedPostgres
from tests.helpers import ROOT, AnsweringServer, new_world, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        shutil.copyfile(ROOT / "dagster.yaml", Path(folder) / "dagster.yaml")
        yield Path(folder)


def test_run_outlives_a_restart_of_postgres(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assets.reporting.PROGRESS_SECONDS", 0.2)
    server = AnsweringServer(hold=lambda text: text.startswith("late"))
    with EmbeddedPostgres(home / "data", home / "runtime") as postgres, server:
        monkeypatch.setenv("DAGSTER_HOME", str(home))
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", postgres.url)
        with DagsterInstance.get() as instance, new_world(tmp_path, instance) as world:
            world.add_model("held", engine="openai", base_url=server.url, concurrency=4)
            lines = world.chats(20, "early", model="held") + world.chats(4, "late", model="held").replace('"r', '"l')
            batch = world.register("in.jsonl", lines)

            def restart() -> None:
                wait_until(lambda: len(server.asked) == 24, 30)
                postgres.stop()
                down.set()
                assert not stopped.wait(4)  # longer than Dagster itself tries again; progress is told meanwhile
                postgres.start()
                server.gate.set()

            down, stopped = threading.Event(), threading.Event()
            helper = threading.Thread(target=restart)
            helper.start()
            result = world.run(batch.key)
            helper.join()
            assert down.is_set()
            assert result.success
            assert batch.is_published()
            events = instance.get_records_for_run(result.run_id).records
            assert any("batch_output" in str(record.asset_key) for record in events if record.asset_key)
        shutil.rmtree(postgres.socket_dir, ignore_errors=True)
