"""An engine that remembers: an OpenAI-compatible server, as a process that outlives the runs which ask it.

    python -m tests.e2e.witness FOLDER SEED

It prints its port. Each request is a line of FOLDER/asked.jsonl before it is answered. The answer follows from model
and text alone; a text with "refuse" in it is refused, one with "refuse for now" until FOLDER/healed is there.
"""

import hashlib
import json
import os
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 0.008


def answer_to(model: str, text: str) -> str:
    return hashlib.sha256(f"{model}|{text}".encode()).hexdigest() * 3


def is_refused(text: str, healed: bool) -> bool:
    return "refuse" in text and not (healed and "refuse for now" in text)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, seed: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.log = os.open(folder / "asked.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.healed = folder / "healed"
        self.dice = random.Random(seed)
        self.open = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its head
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open += 1

    def finish(self) -> None:
        with self.server.lock:
            self.server.open -= 1
        super().finish()

    def do_GET(self) -> None:
        """How many connections are open, this one apart: 0 when all that dead runs have sent is written down."""
        self.close_connection = True
        self._reply(200, {"open": self.server.open - 1})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, text = body["model"], body["messages"][-1]["content"]
        note = {"model": model, "text": text, "id": self.headers.get("X-Request-Id")}
        os.write(self.server.log, json.dumps(note).encode() + b"\n")
        with self.server.lock:
            seconds = self.server.dice.uniform(0, LONGEST_SECONDS)
        time.sleep(seconds)
        if is_refused(text, self.server.healed.exists()):
            self._reply(400, {"error": {"message": f"refused: {text}"}})
            return
        message = {"role": "assistant", "content": answer_to(model, text)}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._reply(200, {"id": "c", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage})

    def _reply(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # who asked is gone

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), sys.argv[2])
    print(server.server_address[1], flush=True)
    server.serve_forever()
