"""What a warm server saves: time from a run's start to its first answer, and loads over a backfill of small files.

    python -m benchmarks.warm [--files 20] [--lines 5] [--out FILE]

Each run is `vllm-batch run` in a process of its own, with the demo model on a real vLLM; the null engine's run is what
it costs without a model. Nothing is left running at the end.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pyarrow.dataset
import typer
import yaml

from benchmarks.common import machine
from resources.engine.hosts import Hosts

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m"


class Place:
    """A data root and a runtime folder of their own, with the demo model in the catalog."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        entry = {
            "source": str(ROOT / "models" / MODEL),
            "engine_args": {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024},
        }
        (folder / "models.yaml").write_text(yaml.safe_dump({"models": {MODEL: entry}}))

    def run(self, name: str, lines: int, *arguments: str) -> dict[str, Any]:
        """One file through `vllm-batch run`: seconds to the first answer and to the end, and what the run says."""
        file = self.folder / f"{name}.jsonl"
        with file.open("w") as out:
            for number in range(lines):
                body = {"model": MODEL, "max_tokens": 8, "temperature": 0}
                body["messages"] = [{"role": "user", "content": f"{name}: what is {number} plus one?"}]
                request = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
                out.write(json.dumps(request) + "\n")
        command = [sys.executable, "-m", "vllm_batch_pipelines.cli.main", "run", str(file), "--json", *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_BATCH_")} | {
            "VLLM_BATCH_DATA": str(self.folder / "data"),
            "VLLM_BATCH_RUNTIME_DIR": str(self.folder / "run"),
            "VLLM_BATCH_MODELS_FILE": str(self.folder / "models.yaml"),
        }
        started, clock = time.time(), time.monotonic()
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - clock
        if done.returncode:
            raise SystemExit(f"The run failed:\n{done.stderr[-4000:]}")
        document = json.loads(done.stdout)
        table = pyarrow.dataset.dataset(document["results"]).to_table(columns=["finished_at"])
        first = min(row["finished_at"].timestamp() for row in table.to_pylist())
        model = document["models"][0]
        print(f"{name}: first answer after {first - started:.1f} s, done after {seconds:.1f} s", file=sys.stderr)
        return {
            "first_answer": first - started,
            "seconds": seconds,
            "warm": model["warm"],
            "load": model["load_seconds"],
        }


def main(
    files: Annotated[int, typer.Option(help="Files of the backfill.")] = 20,
    lines: Annotated[int, typer.Option(help="Lines of each file.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure what a warm server saves."""
    with tempfile.TemporaryDirectory(prefix="vbw-", dir="/tmp") as folder:
        place = Place(Path(folder))
        try:
            null = place.run("null", lines, "--engine", "null")
            cold = place.run("cold", lines)
            backfill = [place.run(f"file-{number:02}", lines) for number in range(files)]
        finally:
            stop(Hosts(place.folder / "run"))
    report = {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), "lines": lines}
    report |= {"null": null, "cold": cold, "backfill": backfill}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def stop(hosts: Hosts) -> None:
    while hosts.status():
        hosts.stop_idle()
        time.sleep(0.2)


def show(report: dict[str, Any]) -> None:
    backfill, lines = report["backfill"], report["lines"]
    warm = sorted(run["first_answer"] for run in backfill)[len(backfill) // 2]
    print(f"{MODEL}, {lines} lines a file, {report['machine']}, {report['date']}\n")
    print("| run | seconds to the first answer |")
    print("|---|---|")
    print(f"| null engine | {report['null']['first_answer']:.1f} |")
    print(f"| cold (load {report['cold']['load']:.1f} s) | {report['cold']['first_answer']:.1f} |")
    print(f"| warm, median of {len(backfill)} | {warm:.1f} |")
    loads = 1 + sum(not run["warm"] for run in backfill)
    total = sum(run["seconds"] for run in backfill)
    print(f"\n{len(backfill) + 1} files one after the other: {loads} load, {total:.0f} s after the first")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
