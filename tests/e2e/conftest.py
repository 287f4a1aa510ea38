"""One real engine for all tests that need one."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resources.engine.catalog import ModelEntry
from resources.engine.hosts import Hosts
from resources.engine.vllm_server import VllmServer
from tests.helpers import wait_until

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "models" / "smollm2-135m"
ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}

ServerMaker = Callable[..., VllmServer]


@pytest.fixture(scope="session")
def demo_entry() -> ModelEntry:
    """The demo model's entry in a catalog."""
    if not (DEMO_MODEL / "config.json").is_file():
        pytest.fail(f"No demo model at {DEMO_MODEL}: run `make demo-model`.", pytrace=False)
    return ModelEntry(name="smollm2-135m", source=str(DEMO_MODEL), aliases=("smollm",), engine_args=ENGINE_ARGS)


@pytest.fixture(scope="session")
def engine_dir() -> Iterator[Path]:
    """A short folder: sockets lie below it."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def vllm_server(demo_entry: ModelEntry, engine_dir: Path) -> Iterator[VllmServer]:
    """The demo model on a real vLLM, started once: 20 to 60 s on two cores."""
    with VllmServer(demo_entry, runtime_dir=engine_dir / "shared", log_dir=engine_dir / "logs") as server:
        server.start()
        yield server
    hosts = Hosts(engine_dir / "shared")
    hosts.stop_idle()
    wait_until(lambda: not hosts.status(), 30)
