"""A real embedded PostgreSQL: started, stopped, killed, taken over."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg2  # type: ignore[import-untyped]
import pytest

from resources.errors import SettingsError
from resources.filesystem import filesystem_type, refuse_remote_filesystem
from resources.postgres import EmbeddedPostgres, find_postgres_url, runtime_folder
from resources.settings import Settings
from tests.helpers import wait_until

pytestmark = pytest.mark.e2e


_OWNER = """
import sys, time
from pathlib import Path
from resources.postgres import EmbeddedPostgres
print(EmbeddedPostgres(Path(sys.argv[1]), Path(sys.argv[2])).start(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """Short, unlike pytest's own: a socket stands in it or beside it."""
    folder = Path(tempfile.mkdtemp(prefix="vb-"))
    yield folder
    for left in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(left)


@pytest.fixture(scope="module")
def empty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made once: initdb takes longer than all the rest of a test."""
    with tempfile.TemporaryDirectory(prefix="vb-") as runtime:
        data_dir = tmp_path_factory.mktemp("cluster")
        with EmbeddedPostgres(data_dir, Path(runtime)) as server:
            pass
        yield server.pgdata
        if server.socket_dir.exists():
            shutil.rmtree(server.socket_dir)


@pytest.fixture
def postgres(tmp_path: Path, runtime_dir: Path, empty_cluster: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path / "data", runtime_dir)
    server.data_dir.mkdir(mode=0o700)
    subprocess.run(["cp", "-a", empty_cluster, server.pgdata], check=True)
    yield server
    server.stop()


def query(url: str, *statements: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(url)
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def postmaster_pid(server: EmbeddedPostgres) -> int:
    return int((server.pgdata / "postmaster.pid").read_text().splitlines()[0])


def owner_process(server: EmbeddedPostgres, runtime_dir: Path) -> subprocess.Popen[str]:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(server.data_dir), str(runtime_dir)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    assert owner.stdout.readline().startswith("postgresql://")
    return owner


def test_data_stays_over_a_stop_and_a_start(postgres: EmbeddedPostgres) -> None:
    query(postgres.start(), "create table t (n int)", "insert into t values (7)")
    postgres.stop()
    assert not postgres.is_running
    assert not postgres.url_file.exists()
    assert query(postgres.start(), "select n from t") == [(7,)]


def test_only_the_owner_can_reach_it(postgres: EmbeddedPostgres) -> None:
    url = postgres.start()

    assert query(url, "show listen_addresses") == [("",)]
    assert stat.S_IMODE(postgres.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((postgres.socket_dir / ".s.PGSQL.5432").stat().st_mode) == 0o700
    assert stat.S_IMODE(postgres.url_file.stat().st_mode) == 0o600
    for private in ("batches", "inbox", "postgres"):
        assert stat.S_IMODE((postgres.data_dir / private).stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands the server to another user")
def test_as_root_the_folders_above_can_be_passed_but_not_listed(postgres: EmbeddedPostgres) -> None:
    postgres.start()

    assert stat.S_IMODE(postgres.data_dir.stat().st_mode) == 0o701
    assert Path(f"/proc/{postmaster_pid(postgres)}").stat().st_uid == postgres.pgdata.stat().st_uid != 0


def test_a_deep_data_root_is_no_matter(tmp_path: Path, runtime_dir: Path) -> None:
    deep = tmp_path.joinpath(*["a folder with a long name"] * 8)
    with EmbeddedPostgres(deep, runtime_dir) as server:
        assert query(server.url, "select 1") == [(1,)]


def test_a_runtime_folder_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="VLLM_BATCH_RUNTIME_DIR"):
        EmbeddedPostgres(tmp_path / "data", tmp_path / ("long" * 30)).start()


def test_a_server_whose_owner_was_killed_is_taken_over(postgres: EmbeddedPostgres, runtime_dir: Path) -> None:
    owner = owner_process(postgres, runtime_dir)
    query(postgres.url, "create table t (n int)", "insert into t values (1)")
    orphan = postmaster_pid(postgres)
    owner.kill()
    owner.wait()

    url = postgres.start()

    assert query(url, "select n from t") == [(1,)]
    assert postmaster_pid(postgres) != orphan


def test_a_server_whose_owner_was_killed_can_be_stopped(postgres: EmbeddedPostgres, runtime_dir: Path) -> None:
    owner = owner_process(postgres, runtime_dir)
    owner.kill()
    owner.wait()
    assert postgres.is_running

    postgres.stop()

    assert not postgres.is_running
    assert not (postgres.pgdata / "postmaster.pid").exists()


def test_a_killed_server_starts_again_with_what_was_committed(postgres: EmbeddedPostgres) -> None:
    query(postgres.start(), "create table t (n int)", "insert into t values (1)")
    os.kill(postmaster_pid(postgres), signal.SIGKILL)
    wait_until(lambda: not postgres.is_running)

    assert query(postgres.start(), "select n from t") == [(1,)]


def test_a_pid_file_that_names_a_strangers_process_does_not_keep_it_down(postgres: EmbeddedPostgres) -> None:
    postgres.start()
    pid_file = postgres.pgdata / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    postgres.stop()
    account = postgres.pgdata.stat()
    as_account = {"user": account.st_uid} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "600"], **as_account)  # type: ignore[call-overload]
    try:
        pid_file.write_text("\n".join([str(stranger.pid), *lines[1:], ""]))
        os.chown(pid_file, account.st_uid, account.st_gid)
        assert query(postgres.start(), "select 1") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_second_owner_is_refused_and_told_of_the_first(postgres: EmbeddedPostgres, runtime_dir: Path) -> None:
    postgres.start()
    other = EmbeddedPostgres(postgres.data_dir, runtime_dir)
    for use in (other.start, other.stop):
        with pytest.raises(SettingsError, match=rf"pid {os.getpid()}"):
            use()
    assert postgres.is_running


def test_other_commands_find_it_while_it_runs(postgres: EmbeddedPostgres, runtime_dir: Path) -> None:
    settings = Settings(data=postgres.data_dir, runtime_dir=runtime_dir, _env_file=None)
    assert find_postgres_url(settings) is None

    url = postgres.start()
    assert find_postgres_url(settings) == url

    postgres.stop()
    (runtime_folder(postgres.data_dir, runtime_dir) / "postgres-url").write_text(url)  # as after a power cut
    assert find_postgres_url(settings) is None


def test_remote_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda1 / ext4 rw 0 0\n"
        "server:/export /mnt/with\\040space nfs4 rw 0 0\n"
        "bucket /mnt/bucket fuse.s3fs rw 0 0\n"
        "/dev/sdb1 /mnt/bucket/local xfs rw 0 0\n"
    )
    assert filesystem_type(Path("/mnt/with space/deep/data"), mounts) == "nfs4"
    assert filesystem_type(Path("/mnt/bucket/local/data"), mounts) == "xfs"
    assert filesystem_type(Path("/mnt/bucketeer"), mounts) == "ext4"

    refuse_remote_filesystem(tmp_path)
    monkeypatch.setattr("resources.filesystem._MOUNTS", mounts)
    with pytest.raises(SettingsError, match=r"/mnt/bucket/data is on a fuse\.s3fs file system.*VLLM_BATCH_DATA"):
        refuse_remote_filesystem(Path("/mnt/bucket/data"))
