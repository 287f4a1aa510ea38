"""A batch through the lean core: no Dagster, no database. The same functions that the assets call.

python examples/simple_batch.py                    # the null engine: nothing is loaded
python examples/simple_batch.py smollm2-135m       # a model of models.yaml
"""

import json
import sys
import tempfile
from pathlib import Path

from resources import pipeline
from resources.batch_store.store import BatchStore
from resources.engine.catalog import load_catalog
from resources.engine.factory import EngineStarter
from resources.settings import settings

QUESTIONS = ["What is the capital of France?", "Name three fruits.", "What is 2 + 2?"]


def main(model: str) -> None:
    work = Path(tempfile.mkdtemp(prefix="simple-batch-"))

    # 1. A file in OpenAI Batch format: one request a line.
    file = work / "questions.jsonl"
    with file.open("w") as lines:
        for number, question in enumerate(QUESTIONS):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": 24,
            }
            request = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.write(json.dumps(request) + "\n")

    # 2. Registered, it becomes a batch: a snapshot in a folder, under a key that follows from its content.
    batch = BatchStore(work / "data").register(file, {"chunk_rows": 100}).batch
    catalog = load_catalog(settings().models_file)
    engines = EngineStarter(settings().runtime_root, work / "logs")

    # 3. Check, answer, publish. Each can be interrupted and called again: what is done stays done.
    with batch.lock("examples/simple_batch.py"):
        checked = pipeline.check(batch, catalog)
        print(f"{batch.key}: {checked.valid} of {checked.lines} lines are valid")
        pipeline.answer(batch, catalog, engines, progress=lambda p: print(f"  {p.done} of {p.total} {p.note}"))
        published = pipeline.publish(batch)

    # 4. The outputs, in input order.
    print(f"{published.succeeded} answered, {published.failed} error rows, in {batch.output_dir}")
    for line in (batch.output_dir / "output.jsonl").open():
        answer = json.loads(line)
        print(answer["custom_id"], "->", answer["response"]["body"]["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "dry-run")
