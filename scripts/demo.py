"""`make demo`: the main job on real parts. Starts the stack, submits examples/demo.jsonl, shows what came back.

The batch stays: a second `make demo` finds it answered, and `make up` shows it in the web UI.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from resources.settings import settings
from vllm_batch_pipelines.stack import stack_state

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "examples" / "demo.jsonl"
COMMAND = [sys.executable, "-m", "vllm_batch_pipelines.cli.main"]
SHOWN = ("chat-capital", "chat-primes", "system-translate", "json-person", "completion-days")
UP_SECONDS = 240

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    started = time.monotonic()
    console.print(
        f"[bold]1.[/] {FILE.relative_to(ROOT)}: {sum(1 for _ in FILE.open())} requests, some of them bad on purpose."
    )
    console.print("[bold]2.[/] Starting the stack: PostgreSQL, Dagster's web UI and daemon.")
    stack, was_up = start_stack()
    try:
        console.print("[bold]3.[/] Submitting the file. A vLLM server is started and answers every line.")
        submitted = subprocess.run(
            [*COMMAND, "submit", str(FILE), "--wait", "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if submitted.returncode not in (0, 1):
            console.print(f"[red]The batch did not complete.[/] Logs: {settings().data_root / 'logs'}")
            return submitted.returncode
        show(json.loads(submitted.stdout), time.monotonic() - started)
    finally:
        if stack is not None:
            console.print("Stopping the stack.")
            stop(stack)
    console.print("\n[bold]Next[/]")
    if was_up:
        console.print("  your stack is still up; look at the partition of this batch in its web UI")
    else:
        console.print(
            "  make up                                  the web UI, with this batch in it; drop files in the inbox"
        )
    console.print("  .venv/bin/vllm-batch run FILE -o answers.jsonl     your own file, without the stack")
    console.print("  models.yaml                              name your own models")
    return 0


def start_stack() -> tuple[subprocess.Popen[bytes] | None, bool]:
    """The stack that we started, or None where one runs already."""
    if stack_state(settings()) is not None:
        console.print("   It is up already.")
        return None, True
    stack = subprocess.Popen([*COMMAND, "up", "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + UP_SECONDS
    while (state := stack_state(settings())) is None or not state["url"]:
        if stack.poll() is not None or time.monotonic() > deadline:
            stop(stack)
            assert stack.stderr
            raise SystemExit(f"The stack did not start:\n{stack.stderr.read().decode()}")
        time.sleep(0.25)
    console.print(f"   Up at {state['url']}")
    return stack, False


def stop(stack: subprocess.Popen[bytes]) -> None:
    stack.terminate()
    try:
        stack.wait(60)
    except subprocess.TimeoutExpired:
        stack.kill()


def show(status: dict[str, Any], seconds: float) -> None:
    console.print(
        f"[bold]4.[/] {status['key']}: {status['lines']} lines, [green]{status['succeeded']} answered[/], "
        f"{status['failed']} error rows, {seconds:.0f} s with all starts.\n"
    )
    answers = {row["custom_id"]: row for row in read_jsonl(status["output_file"])}
    for line in FILE.read_bytes().splitlines():
        try:
            request = json.loads(line)
        except ValueError:
            continue
        if request.get("custom_id") in SHOWN and request["custom_id"] in answers:
            choice = answers.pop(request["custom_id"])["response"]["body"]["choices"][0]
            body = request["body"]
            question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            answer = (choice.get("message") or {}).get("content") or choice.get("text")
            console.print(f"   [cyan]Q[/] {one_line(question)}")
            console.print(f"   [cyan]A[/] {one_line(answer)}\n")
    console.print("   and what a bad line gets:")
    for row in read_jsonl(status["error_file"])[:3]:
        error = row["error"] or row["response"]["body"]["error"]
        console.print(f"   [yellow]E[/] {error['code']}: {one_line(error['message'])}")
    console.print(f"\n   answers  {status['output_file']}")
    console.print(f"   errors   {status['error_file']}")
    console.print(f"   rows     {Path(status['output_file']).parent / 'results'} (Parquet)")


def read_jsonl(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def one_line(text: str) -> str:
    return " ".join(text.split()).replace("[", r"\[")


if __name__ == "__main__":
    raise SystemExit(main())
