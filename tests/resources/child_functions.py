"""What `test_child.py` has called in a process of its own. Imports little, as each of its tests waits for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from resources.child import Tell
from resources.errors import BatchError


def double(tell: Tell, number: int) -> int:
    tell("begun")
    print("a print is no word of the protocol")
    return 2 * number


def refuse(tell: Tell) -> None:
    raise BatchError("no: postgresql://me:pass1@host/db is closed")


def stumble(tell: Tell) -> None:
    raise ValueError("boom")


def crash(tell: Tell) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(tell: Tell) -> None:
    sys.exit(3)


def hang(tell: Tell, note: str) -> None:
    """With a process of its own that hangs too."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(f"{os.getpid()} {grandchild.pid}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def murmur(tell: Tell) -> str:
    for number in range(4):
        tell(number)
        time.sleep(0.8)
    return "done"
