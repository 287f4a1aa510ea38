"""What an engine host says to its server: is it up, sleep, wake, and a canary.

The endpoints are vLLM's own (`vllm/entrypoints/serve/dev/sleep`). `POST /sleep?level=1` drops the prefix cache, moves
the weights to the machine's memory and gives back that of the KV cache; it answers when this is done. To look at
`GET /is_sleeping` alone would not do: it says yes from the moment on at which requests are not taken any more.

HTTP by hand: http.client would double the time that a host takes to start, and a call could not be given up.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.2
HEALTH_SECONDS = 1.0

_PROMPT = "The quick brown fox jumps over the lazy dog. Once upon a time"
# The first of these that a model takes is its canary.
_CANARIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/completions",
        {"prompt": _PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True},
    ),
    ("/v1/embeddings", {"input": _PROMPT}),
    ("/v1/score", {"text_1": _PROMPT, "text_2": "A fox jumped over a dog."}),
)
_NEAR = 0.01  # of a vector's largest number


class Server:
    """The server on a socket.

    `seconds` is the longest that a call may take (but for health), and `gives_up` is asked all the while.
    """

    def __init__(self, socket_path: Path, seconds: float, gives_up: Callable[[], bool]) -> None:
        self._path, self._seconds, self._gives_up = str(socket_path), seconds, gives_up

    def is_healthy(self) -> bool:
        return self._http("GET /health", None, HEALTH_SECONDS)[0] == 200

    def sleep(self) -> bool:
        """Whether it sleeps now; the memory of its devices is free then."""
        return self._ask("POST /sleep?level=1") is not None and self._is_sleeping() is True

    def wake(self) -> bool:
        """Whether it is awake again, all of it."""
        return self._ask("POST /wake_up") is not None and self._is_sleeping() is False

    def canary(self, names: Sequence[str]) -> list[Any] | None:
        """For each name the tokens of a greedy answer, or a vector; None where one of them gives none."""
        found = []
        for name in names:
            asked = (self._ask(f"POST {path}", {"model": name, **body}) for path, body in _CANARIES)
            answer = next((answer for answer in asked if answer is not None), None)
            try:
                found.append(_essence(answer))
            except (KeyError, IndexError, TypeError):
                return None
        return found

    def _is_sleeping(self) -> object:
        answer = self._ask("GET /is_sleeping")
        return answer.get("is_sleeping") if isinstance(answer, dict) else None

    def _ask(self, request: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that comes with a 200; None otherwise."""
        status, answer = self._http(request, body, self._seconds)
        with contextlib.suppress(ValueError):
            return json.loads(answer) if status == 200 else None
        return None

    def _http(self, request: str, body: dict[str, Any] | None, seconds: float) -> tuple[int, bytes]:
        """Status and body; 0 without an answer."""
        content = json.dumps(body).encode() if body else b""
        head = f"{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        deadline, answer = time.monotonic() + seconds, b""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection, contextlib.suppress(OSError):
            connection.settimeout(HEALTH_SECONDS)
            connection.connect(self._path)
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            connection.settimeout(LOOK_SECONDS)
            while time.monotonic() < deadline and not self._gives_up():
                try:
                    part = connection.recv(65536)
                except TimeoutError:
                    continue
                if part:
                    answer += part
                    continue
                status, _, said = answer.partition(b"\r\n\r\n")
                return int(status[9:12]) if status[9:12].isdigit() else 0, said
        return 0, b""


def agree(before: list[Any], after: list[Any] | None) -> bool:
    """Whether a canary gave the same again: tokens to the last one, a vector but for its last digits."""
    return after is not None and all(map(_is_same, before, after))


def _essence(answer: Any) -> dict[str, Any]:
    if "choices" in answer:
        choice = answer["choices"][0]
        return {"tokens": choice.get("token_ids") or choice["text"]}
    found = answer["data"][0]
    return {"vector": found["embedding"] if "embedding" in found else [found["score"]]}


def _is_same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    one, other = before.get("vector", ()), after.get("vector", ())
    if before == after or not all(isinstance(number, float) for number in (*one, *other)):
        return before == after
    near = _NEAR * max(map(abs, one), default=0)
    return len(one) == len(other) > 0 and all(abs(a - b) <= near for a, b in zip(one, other, strict=True))
