"""A Label Studio of one's own, for those who have none: `vllm-batch up --with-curation`, or `make label-studio`.

Its packages do not go together with ours: they have an environment of their own in `.label-studio/`, beside an empty
database with a user and a token. What people do is in `label-studio/` of the data root. Listens on 127.0.0.1 alone.

    python -m resources.label_studio.local_server install       make the environment and the empty database
    python -m resources.label_studio.local_server start         start, with the user, token and project, until Ctrl-C
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources import durable
from resources.errors import CurationError
from resources.settings import Settings, settings

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".label-studio"
REQUIREMENTS = ROOT / "requirements" / "label-studio.txt"
PROJECT = "Reviews"
_EMPTY = HOME / "empty"
_STAMP = HOME / "installed"
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
    """A running server; `process` where it is a child of ours."""

    url: str
    account: Account
    process: "subprocess.Popen[bytes] | None" = None

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


def is_installed() -> bool:
    return _has_packages() and (_EMPTY / "ready").exists()


def install() -> None:
    """Make the environment and the empty database; done already: nothing happens. Minutes the first time."""
    if not _has_packages():
        print(f"label-studio: making its own environment in {HOME} (about 4 minutes, 1 GB)", file=sys.stderr)
        shutil.rmtree(HOME / "venv", ignore_errors=True)
        HOME.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", HOME / "venv"], check=True)
        pip = [str(HOME / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
        subprocess.run([*pip, "--disable-pip-version-check", "-r", str(REQUIREMENTS)], check=True)
        shutil.rmtree(_EMPTY, ignore_errors=True)
        _STAMP.write_text(REQUIREMENTS.read_text("utf-8"), "utf-8")
    if not (_EMPTY / "ready").exists():
        print("label-studio: making its database (about a minute)", file=sys.stderr)
        shutil.rmtree(_EMPTY, ignore_errors=True)
        with running(_EMPTY):
            pass
        (_EMPTY / "ready").touch()


def _has_packages() -> bool:
    return _STAMP.exists() and _STAMP.read_text("utf-8") == REQUIREMENTS.read_text("utf-8")


def data_folder(config: Settings) -> Path:
    return config.data_root / "label-studio"


def copy_of_empty(folder: Path) -> None:
    """A data folder with the user, the token and an empty database, so that a start takes seconds."""
    if not folder.exists():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = durable.temporary_beside(folder)
        shutil.copytree(_EMPTY, made)
        made.rename(folder)


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[Server]:
    """A server over a data folder, on a free port by default; it ends with the context."""
    port = port or _free_port()
    started_with = environment(folder)
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command(port),
            env=started_with,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = address(port)
            _wait_until_ready(url, process, folder / "server.log")
            yield Server(url, Account.of(folder), process)
        finally:
            _end(process)


def address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def command(port: int) -> list[str]:
    program = str(HOME / "venv" / "bin" / "label-studio")
    return [program, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]


def environment(folder: Path) -> dict[str, str]:
    """What a server over this data folder is started with: its secrets too, which a command line would show to all."""
    account = Account.of(folder)
    own = {
        "LABEL_STUDIO_USERNAME": account.user,
        "LABEL_STUDIO_PASSWORD": account.password,
        "LABEL_STUDIO_USER_TOKEN": account.token,
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
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | own


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with suppress(OSError, urllib.error.URLError), _opener().open(f"{url}/health", timeout=5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            end = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
            raise CurationError(f"Label Studio did not come up. The end of {log}:\n{end}")
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
    folder = data_folder(settings())
    copy_of_empty(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running(folder, settings().label_studio_port) as server:
        token = server.personal_access_token()
        print(
            f"\nLabel Studio: {server.url}\n"
            f"  user      {server.account.user}\n  password  {server.account.password}\n\n"
            "Put this into .env and start the stack (`make up`); the project is made with the first batch:\n\n"
            f"VLLM_BATCH_LABEL_STUDIO_URL={server.url}\n"
            f"VLLM_BATCH_LABEL_STUDIO_API_KEY={token}\n"
            f"VLLM_BATCH_LABEL_STUDIO_PROJECT={PROJECT}\n\nCtrl-C stops it; what was reviewed stays in {folder}.",
            flush=True,
        )
        assert server.process is not None
        with suppress(KeyboardInterrupt):
            server.process.wait()


if __name__ == "__main__":
    {"install": install, "start": start}[sys.argv[1] if len(sys.argv) > 1 else "start"]()
