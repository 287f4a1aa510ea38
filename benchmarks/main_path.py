"""The main path without a model: a large file through the three assets of a real Dagster run on PostgreSQL.

    python -m benchmarks.main_path [--lines 1000000] [--runs 1] [--out FILE]

The null engine answers at once, so what is measured is ours: reading, checking, dispatch, commits, outputs. Each run is
a process of its own (peak memory is the kernel's figure for it) on a fresh data root.
"""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

LINE_BYTES = 600
ASSETS = ("batch_requests", "batch_results", "batch_output")


def main(
    lines: Annotated[int, typer.Option(help="Lines of the file, 600 bytes each.")] = 1_000_000,
    runs: Annotated[int, typer.Option(help="Runs; medians are shown.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure the main path with the null engine."""
    with tempfile.TemporaryDirectory(prefix="vllm-batch-bench-", dir="/tmp") as folder:
        work = Path(folder)
        file = work / "bench.jsonl"
        print(f"writing {lines} lines of {LINE_BYTES} bytes ...", file=sys.stderr)
        write_input(file, lines)
        figures = []
        for run in range(runs):
            shutil.rmtree(work / "data", ignore_errors=True)
            print(f"run {run + 1} of {runs} ...", file=sys.stderr)
            figures.append(measure(work, file))
    report = {"machine": machine(), "date": datetime.now(UTC).date().isoformat(), "lines": lines, "runs": figures}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def write_input(path: Path, lines: int) -> None:
    request: dict[str, Any] = {
        "custom_id": "request-000000000",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "dry-run", "messages": [{"role": "user", "content": ""}], "temperature": 0, "max_tokens": 64},
    }
    words = "the quick brown fox jumps over the lazy dog and asks a question: "
    missing = LINE_BYTES - len(json.dumps(request)) - 1
    with path.open("w") as file:
        for number in range(lines):
            request["custom_id"] = f"request-{number:09d}"
            request["body"]["messages"][0]["content"] = (f"{number} " + words * 10)[:missing]
            file.write(json.dumps(request) + "\n")


def measure(work: Path, file: Path) -> dict[str, float]:
    """One Dagster run in a process of its own."""
    models = work / "models.yaml"
    models.write_text('models: {dry-run: {engine: "null"}}\n')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_BATCH_")} | {
        "VLLM_BATCH_DATA": str(work / "data"),
        "VLLM_BATCH_RUNTIME_DIR": str(work / "run"),
        "VLLM_BATCH_MODELS_FILE": str(models),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.main_path", "--child", str(file)]
    with (work / "log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"The run failed:\n{(work / 'log').read_text()[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def child(file: Path) -> None:
    """Register the file, run process_batch on a real instance, print the figures as one line of JSON."""
    from assets.partitions import BATCH_FILES
    from resources.batch_store.store import BatchStore
    from resources.postgres import EmbeddedPostgres
    from resources.settings import settings
    from vllm_batch_pipelines.definitions import defs
    from vllm_batch_pipelines.stack import instance_env

    config = settings()
    config.data_root.mkdir(parents=True)
    config.dagster_home_dir.mkdir()
    figures: dict[str, float] = {}
    with EmbeddedPostgres(config.data_root, config.runtime_root), instance_env(config) as instance:
        started = time.monotonic()
        batch = BatchStore(config.data_root).register(file).batch
        figures["register"] = time.monotonic() - started
        instance.add_dynamic_partitions(str(BATCH_FILES.name), [batch.key])
        started = time.monotonic()
        result = defs.resolve_job_def("process_batch").execute_in_process(instance=instance, partition_key=batch.key)
        figures["run"] = time.monotonic() - started
        for step in instance.get_run_step_stats(result.run_id):
            figures[step.step_key] = (step.end_time or 0) - (step.start_time or 0)
        summary = batch.output_summary() or {}
        assert summary["succeeded"] == summary["lines"], summary
        figures["lines"] = summary["lines"]
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def show(report: dict[str, Any]) -> None:
    lines = report["lines"]
    print(f"{lines} lines of {LINE_BYTES} bytes, null engine, {report['machine']}, {report['date']}\n")
    print("| step | seconds | lines/s |")
    print("|---|---|---|")
    for name in ("register", *ASSETS, "run"):
        seconds = statistics.median(run[name] for run in report["runs"])
        print(f"| {'whole run' if name == 'run' else name} | {seconds:.1f} | {lines / seconds:,.0f} |")
    print(f"\npeak memory {statistics.median(run['peak_rss_mb'] for run in report['runs']):.0f} MB")


def machine() -> str:
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]))
    else:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(main)
        app()
