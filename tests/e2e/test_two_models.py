"""Two real models that cannot be on the device together: chat and embeddings, in one file and in runs by turns. A LoRA
adapter that is served beside its base model."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from resources import pipeline
from resources.batch_store.store import BatchStore
from resources.engine.catalog import Catalog, ModelEntry
from resources.engine.factory import EngineStarter
from resources.engine.hosts import Hosts
from resources.pipeline import AnswerReport
from tests.helpers import read_jsonl, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EMBEDDER = Path(__file__).resolve().parents[2] / "models" / "all-minilm-l6-v2"
CHAT, EMBED, ADAPTED = "smollm2-135m", "minilm", "smollm2-noisy"


@pytest.fixture
def runtime() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="vb"))
    yield folder
    hosts = Hosts(folder)
    hosts.stop_idle()
    wait_until(lambda: not hosts.status(), 30)
    shutil.rmtree(folder)


def write_adapter(folder: Path, entry: ModelEntry) -> Path:
    """A LoRA adapter in the format of `peft`, of random numbers: it answers unlike its base, and always the same."""
    config = json.loads((Path(str(entry.source)) / "config.json").read_text())
    width, random = config["hidden_size"], np.random.default_rng(7)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = random.normal(0, 0.2, (4, width)).astype(np.float32)
        weights[f"{name}.lora_B.weight"] = random.normal(0, 0.2, (width, 4)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def catalog(demo_entry: ModelEntry, tmp_path: Path) -> Catalog:
    if not (EMBEDDER / "config.json").is_file():
        pytest.fail(f"No embedding model at {EMBEDDER}: run `make test-models`.", pytrace=False)
    embedder = {"dtype": "float32", "enforce_eager": True}
    adapters = {ADAPTED: str(write_adapter(tmp_path / "adapter", demo_entry))}
    chat = demo_entry.model_copy(update={"adapters": adapters})
    return Catalog([chat, ModelEntry(name=EMBED, source=str(EMBEDDER), engine_args=embedder)])


def line(custom_id: str, text: str, model: str) -> dict[str, Any]:
    body: dict[str, Any]
    if model == EMBED:
        url, body = "/v1/embeddings", {"model": EMBED, "input": text}
    else:
        message = {"role": "user", "content": text}
        url, body = "/v1/chat/completions", {"model": model, "messages": [message], "max_tokens": 12, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def closeness(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


class Place:
    def __init__(self, folder: Path, runtime: Path, catalog: Catalog) -> None:
        self.folder, self.catalog = folder, catalog
        self.store = BatchStore(folder / "data")
        self.engines = EngineStarter(runtime, folder / "logs")

    def run(self, name: str, lines: list[dict[str, Any]]) -> tuple[AnswerReport, dict[str, Any]]:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        batch = self.store.register(file).batch
        with batch.lock("a test"):
            pipeline.check(batch, self.catalog)
            report = pipeline.answer(batch, self.catalog, self.engines)
            summary = pipeline.publish(batch)
        assert summary.failed == 0
        answers = read_jsonl(batch.output_dir / "output.jsonl")
        return report, {answer["custom_id"]: answer["response"]["body"] for answer in answers}


def test_two_models_take_turns_with_as_few_loads_as_can_be(tmp_path: Path, runtime: Path, catalog: Catalog) -> None:
    place = Place(tmp_path, runtime, catalog)
    texts = {"cat": "the cat sat", "rest": "a feline rested", "stock": "stock markets fell"}
    mixed = [line(f"chat-{n}", "What is the capital of France?", CHAT) for n in range(3)]
    for at, (name, text) in enumerate(texts.items()):
        mixed.insert(2 * at, line(name, text, EMBED))

    first, answers = place.run("first", mixed)
    assert [(model.warm, model.swaps) for model in first.models] == [(False, 0), (False, 1)]
    assert "Paris" in answers["chat-0"]["choices"][0]["message"]["content"]
    vectors = {name: answers[name]["data"][0]["embedding"] for name in texts}
    assert closeness(vectors["cat"], vectors["rest"]) > 0.4 > closeness(vectors["cat"], vectors["stock"])

    # The one that is warm now goes first, so the other one alone is loaded.
    lines = [line(f"{model}-{n}", f"number {n}", model) for n in range(2) for model in (CHAT, EMBED)]
    again, _ = place.run("second", lines)
    assert [(model.model, model.warm, model.swaps) for model in again.models] == [
        (first.models[-1].model, True, 0),
        (first.models[0].model, False, 1),
    ]

    # An adapter is a model to those who ask, and the server of its base to the device.
    question = "What is the capital of France?"
    lines = [line(model, question, model) for model in (CHAT, ADAPTED)]
    third, answers = place.run("third", lines)
    loads = [model for model in third.models if not model.warm]
    assert len(loads) == (0 if again.models[-1].model == CHAT else 1)
    contents = {name: answers[name]["choices"][0]["message"]["content"] for name in (CHAT, ADAPTED)}
    assert "Paris" in contents[CHAT]
    assert contents[ADAPTED] != contents[CHAT]
    assert answers[ADAPTED]["model"] == ADAPTED
    assert len(Hosts(runtime).status()) == 1
