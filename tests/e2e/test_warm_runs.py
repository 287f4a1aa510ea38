"""Warm reuse across real Dagster runs: the second finds the server that the first has left."""

import pytest

from resources.engine.catalog import ModelEntry
from resources.engine.hosts import Hosts
from tests.helpers import World, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_second_run_finds_the_server_of_the_first_warm_and_both_say_so(world: World, demo_entry: ModelEntry) -> None:
    world.add_model(demo_entry.name, source=demo_entry.source, engine_args=demo_entry.engine_args)
    hosts = Hosts(world.settings.runtime_root)
    try:
        said = []
        for number in range(2):
            batch = world.register(f"{number}.jsonl", world.chats(2, str(number), model=demo_entry.name, max_tokens=4))
            result = world.run(batch.key)
            assert result.success
            (event,) = result.asset_materializations_for_node("batch_results")
            said.append((str(event.metadata["engine"].value), event.metadata["swaps"].value))
        assert said[0][0].startswith("smollm2-135m: cold, loaded in ")
        assert said[1] == ("smollm2-135m: warm", 0)
        (host,) = hosts.status()
        assert host.leases == []
    finally:
        hosts.stop_idle()
        wait_until(lambda: not hosts.status(), 30)
