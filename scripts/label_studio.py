"""A Label Studio of one's own, for those who have none: `make label-studio`. Tests start theirs by the same functions.

It lives in `.label-studio/`: its own environment (its packages do not go together with ours), and its data, with a
user, a token and an empty database that were made once. Listens on 127.0.0.1 alone.

    python scripts/label_studio.py install        make the environment and the empty database
    python scripts/label_studio.py start          start, with the user, token and project, until Ctrl-C
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".label-studio"
REQUIREMENTS = ROOT / "requirements" / "label-studio.txt"
PORT = 8080
PROJECT = "Reviews"
_EMPTY = HOME / "empty"
_DATA = HOME / "data"
_READY_SECONDS = 300


@dataclass(frozen=True)
class Account:
    """The one user of a local server. `token` is a legacy token; it can mint a personal access token."""

    user: str
    password: str
    token: str

    @staticmethod
    def of(folder: Path) -> "Account":
        """The account in a data folder, made where there is none. Its file is its owner's alone."""
        file = folder / "account.json"
        if not file.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = Account("reviewer@example.org", secrets.token_urlsafe(12), secrets.token_hex(20))
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as stream:
                json.dump(vars(made), stream)
        return Account(**json.loads(file.read_text("utf-8")))


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    account: Account
    process: "subprocess.Popen[bytes]"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request with the legacy token; the reply's JSON."""
        headers = {"Authorization": f"Token {self.account.token}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with _opener().open(request, timeout=60) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def personal_access_token(self) -> str:
        """The user's personal access token, minted where there is none."""
        tokens = self.ask("GET", "/api/token/")
        found = tokens if isinstance(tokens, list) else tokens.get("results", [])
        return str(found[0]["token"] if found else self.ask("POST", "/api/token/")["token"])


def install() -> None:
    """Make the environment and the empty database; done already: nothing happens. Minutes the first time."""
    stamp = HOME / "installed"
    wanted = REQUIREMENTS.read_text("utf-8")
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        print(f"label-studio: making its own environment in {HOME} (about 4 minutes, 1 GB)", file=sys.stderr)
        shutil.rmtree(HOME / "venv", ignore_errors=True)
        HOME.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
        pip = [str(HOME / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
        subprocess.run([*pip, "--disable-pip-version-check", "-r", str(REQUIREMENTS)], check=True)
        shutil.rmtree(_EMPTY, ignore_errors=True)
        stamp.write_text(wanted, "utf-8")
    if not (_EMPTY / "ready").exists():
        print("label-studio: making its database (about a minute)", file=sys.stderr)
        shutil.rmtree(_EMPTY, ignore_errors=True)
        with running(_EMPTY):
            pass
        (_EMPTY / "ready").touch()


def copy_of_empty(folder: Path) -> None:
    """A data folder with the user, the token and an empty database, so that a start takes seconds."""
    if not folder.exists():
        shutil.copytree(_EMPTY, folder)


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[Server]:
    """A server over a data folder, on a free port by default; it ends with the context."""
    account = Account.of(folder)
    port = port or _free_port()
    command = [HOME / "venv" / "bin" / "label-studio", "start", "--no-browser", "--internal-host", "127.0.0.1"]
    command += ["--port", str(port), "--username", account.user, "--password", account.password]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*map(str, command), "--user-token", account.token],
            env=_environment(folder, os.environ),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, folder / "server.log")
            yield Server(url, account, process)
        finally:
            _end(process)


def _environment(folder: Path, outer: Mapping[str, str]) -> dict[str, str]:
    own = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "LATEST_VERSION_CHECK": "false",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "PYTHONUNBUFFERED": "1",
    }
    foreign = ("PYTHON", "VIRTUAL_ENV", "DJANGO", "LABEL_STUDIO", "VLLM_BATCH", "DAGSTER")
    return {name: value for name, value in outer.items() if not name.startswith(foreign)} | own


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with suppress(OSError, urllib.error.URLError), _opener().open(f"{url}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
            raise SystemExit(f"Label Studio did not come up. The end of {log}:\n{end}")
        time.sleep(0.2)


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes by a proxy


def start() -> None:
    """Serve until Ctrl-C, and say how to use it."""
    install()
    copy_of_empty(_DATA)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running(_DATA, int(os.environ.get("LABEL_STUDIO_PORT", PORT))) as server:
        token = server.personal_access_token()
        print(
            f"\nLabel Studio: {server.url}\n"
            f"  user      {server.account.user}\n  password  {server.account.password}\n\n"
            "Put this into .env and start the stack (`make up`); the project is made with the first batch:\n\n"
            f"VLLM_BATCH_LABEL_STUDIO_URL={server.url}\n"
            f"VLLM_BATCH_LABEL_STUDIO_API_KEY={token}\n"
            f"VLLM_BATCH_LABEL_STUDIO_PROJECT={PROJECT}\n\nCtrl-C stops it; what was reviewed stays in {_DATA}.",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            server.process.wait()


if __name__ == "__main__":
    {"install": install, "start": start}[sys.argv[1] if len(sys.argv) > 1 else "start"]()
