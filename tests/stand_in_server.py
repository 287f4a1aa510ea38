"""A stand-in for a vLLM server: a small program that behaves like one towards engine hosts. It loads no model.

Arguments and environment are those that vLLM's server gets. It listens on the socket that `--uds` names and has a
child process, as vLLM has. With `--enable-sleep-mode` and VLLM_SERVER_DEV_MODE it has vLLM's /sleep, /is_sleeping and
/wake_up; while it sleeps, requests for answers are taken and not answered. `--mode` makes it misbehave.

The memory of a device is a locked file beside this program: a server that does not get it ends, as one that runs out
of memory does. `starts` has a line for each start, `calls` one for each sleep and wake. Standard library only.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARGUMENTS = sys.argv
SOCKET = ARGUMENTS[ARGUMENTS.index("--uds") + 1]
NAME = ARGUMENTS[ARGUMENTS.index("--served-model-name") + 1]
MODE = next((argument.split("=")[1] for argument in ARGUMENTS if argument.startswith("--mode=")), "good")
DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES", "cpu")
HAS_SLEEP = "--enable-sleep-mode" in ARGUMENTS and os.environ.get("VLLM_SERVER_DEV_MODE") == "1"

Answer = tuple[int, object] | None


def note(file: str, text: str) -> None:
    with (HERE / file).open("a") as out:
        out.write(f"{NAME} {text}\n")


class Memory:
    """Of all devices, or of none. `crowded`: a model so large that it does not fit beside what a sleeping one keeps."""

    def __init__(self) -> None:
        self._files = [os.open(HERE / f"memory-{name}", os.O_RDWR | os.O_CREAT, 0o600) for name in DEVICES.split(",")]
        self._rest = os.open(HERE / "memory-kept-asleep", os.O_RDWR | os.O_CREAT, 0o600)

    def take(self) -> bool:
        try:
            for file in self._files:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if MODE == "crowded":
                fcntl.flock(self._rest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free(self) -> None:
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(self._rest, fcntl.LOCK_SH | fcntl.LOCK_NB)


class Server:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.sleeping = False
        self.woken = 0

    def answer(self, request: str, body: bytes) -> Answer:
        """Status and JSON; None where there is never an answer."""
        path = request.split(" ")[1]
        if request.startswith("GET ") and path in ("/health", "/v1/models", "/metrics"):
            return 200, {}
        if HAS_SLEEP and path in ("/sleep?level=1", "/wake_up", "/is_sleeping"):
            if path == "/is_sleeping":
                return 200, {"is_sleeping": self.sleeping}
            note("calls", path)
            return self.fall_asleep() if path == "/sleep?level=1" else self.wake()
        if path == ("/v1/embeddings" if MODE == "embeds" else "/v1/completions") and MODE != "no-canary":
            return None if self.sleeping else (200, self.greedy(json.loads(body)))
        return 404, {"detail": "Not Found"}

    def fall_asleep(self) -> Answer:
        if MODE == "hangs-at-sleep":
            return None
        if MODE != "stays-awake":
            self.memory.free()
            self.sleeping = True
        return 200, {"status": "sleeping", "level": 1}

    def wake(self) -> Answer:
        if MODE == "hangs-at-wake":
            return None
        if MODE == "fails-at-wake" or not self.memory.take():
            return 500, {"error": {"message": "CUDA error: out of memory"}}
        self.sleeping = False
        self.woken += 1
        return 200, {"status": "awake", "tags": None}

    def greedy(self, asked: dict[str, object]) -> object:
        assert asked["model"] == NAME
        changed = MODE == "other-tokens" and self.woken
        if MODE == "embeds":
            return {"data": [{"embedding": [0.6, -0.8 + 1e-5 * self.woken]}]}
        assert asked["temperature"] == 0
        return {"choices": [{"text": " once upon", "token_ids": [7, 8, 10 if changed else 9]}]}


def serve(server: Server) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen()
    unanswered = []
    while True:
        connection, _ = listener.accept()
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
        answer = server.answer(head.decode().splitlines()[0], body)
        if answer is None:
            unanswered.append(connection)
            continue
        content = json.dumps(answer[1]).encode()
        connection.sendall(f"HTTP/1.1 {answer[0]} -\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        connection.close()


def main() -> None:
    note("starts", DEVICES)
    memory = Memory()
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "refuses" or not memory.take():
        print("(EngineCore pid=7) ERROR 11-21 01:45:23 [core.py:1] ValueError: no memory for that", flush=True)
        print("who passed it on\n" * 40, end="", flush=True)
        sys.exit(3)
    # As vLLM's engine core it outlives a killed server, far longer than any test: somebody must end it.
    child = [sys.executable, "-S", "-c", "import time; time.sleep(600)", SOCKET]
    subprocess.Popen(child, start_new_session=MODE == "strays")
    print("loaded", flush=True)
    if MODE == "mute":
        signal.pause()
    serve(Server(memory))


main()
