"""A function called in a process of its own: for work that may hang, crash or be other people's.

A thread cannot be ended and a library's own timeout cannot be trusted with somebody else's code; a process can be
killed. What the function says goes by a pipe of its own, so that its prints stay prints: they go where ours go.

The process and whatever it starts form a group that is killed when the call ends, however it ends. When the caller is
killed, the child meets the end of its standard input and kills the group itself.
"""

import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from resources.errors import BatchError, ChildFailed
from resources.redaction import redact

Tell = Callable[[Any], None]
"""Says something (JSON) to the caller."""

_MOST_ERROR_CHARACTERS = 2000
_END_SECONDS = 5
_START_SECONDS = 120
"""For Python and the imports, before the function is called."""


def call_in_child(
    function: str,
    arguments: dict[str, Any],
    *,
    silent_seconds: float,
    hear: Callable[[Any], None] = lambda _: None,
) -> Any:
    """The result of `module:function`, called there with a `tell` and these arguments; all of it JSON.

    Raises:
        ChildFailed: it raised (the message is its own, without the passwords of URLs), ended without a result, or said
            nothing for `silent_seconds`; then it was killed.
    """
    read_end, write_end = os.pipe()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    with os.fdopen(read_end, "rb", buffering=0) as words:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "resources.child", str(write_end)],
                stdin=subprocess.PIPE,
                pass_fds=(write_end,),
                process_group=0,
                env=environment,
            )
        finally:
            os.close(write_end)
        assert process.stdin is not None
        try:
            request = json.dumps({"function": function, "arguments": arguments}).encode() + b"\n"
            _send(process.stdin, request)
            for word in _words(words, silent_seconds):
                if "result" in word:
                    return word["result"]
                if "error" in word:
                    raise ChildFailed(word["error"])
                if "message" in word:
                    hear(word["message"])
            raise ChildFailed(f"its process ended without a result ({_ending(process)})")
        finally:
            _kill_group(process)
            process.wait()
            process.stdin.close()


def _send(stream: BinaryIO | Any, request: bytes) -> None:
    try:
        stream.write(request)
        stream.flush()
    except BrokenPipeError:
        pass  # it is gone already: the end of its words says so


def _words(pipe: Any, silent_seconds: float) -> Iterator[dict[str, Any]]:
    """What the child says, word by word, until it closes the pipe."""
    held, allowed = b"", max(silent_seconds, _START_SECONDS)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            deadline = time.monotonic() + allowed
            while not (line := held.partition(b"\n"))[1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildFailed(f"nothing was heard of it for {allowed:g} s; its process was ended")
                block = pipe.read(65536)
                if not block:
                    return
                held += block
            held, allowed = line[2], silent_seconds
            yield json.loads(line[0])


def _ending(process: subprocess.Popen[bytes]) -> str:
    """How it ended. It is not waited for yet: its number stays its own until its group is killed."""
    deadline = time.monotonic() + _END_SECONDS
    while (found := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        if time.monotonic() > deadline:
            return "it closed its pipe"
        time.sleep(0.02)
    is_signal = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return f"signal {signal.Signals(found.si_status).name}" if is_signal else f"exit status {found.si_status}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Before the leader is waited for: until then its number is nobody else's."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        process.kill()


def main() -> None:
    """The child's side."""
    pipe = int(sys.argv[1])
    os.set_inheritable(pipe, False)
    lock = threading.Lock()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_caller, daemon=True).start()

    def say(word: dict[str, Any]) -> None:
        with lock:
            data = memoryview(json.dumps(word).encode() + b"\n")
            while data:
                data = data[os.write(pipe, data) :]

    def tell(message: Any) -> None:
        say({"message": message})

    try:
        module, _, name = request["function"].partition(":")
        called = getattr(importlib.import_module(module), name)
        say({"started": True})
        word = {"result": called(tell, **request["arguments"])}
    except BatchError as error:
        word = {"error": redact(str(error))}
    except BaseException as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        word = {"error": redact(f"{type(error).__name__}: {error}")[:_MOST_ERROR_CHARACTERS]}
    say(word)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that somebody left behind do not keep us


def _end_with_caller() -> None:
    sys.stdin.buffer.read(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
