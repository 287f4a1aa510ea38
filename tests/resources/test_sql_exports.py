"""Exports to tables: in one transaction, each row once, whatever the database does meanwhile."""

import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC
from pathlib import Path
from typing import Any

import psycopg2
import pyarrow as pa
import pytest
from psycopg2.extensions import connection as Connection
from pydantic import SecretStr
from sqlalchemy import create_engine, text

from resources.answering import Mode
from resources.errors import ExportFailed, SettingsError
from resources.exports.export import export_latest
from resources.exports.gold_stars import rows_of as gold_stars_of
from resources.exports.published import Published
from resources.exports.rows import Rows, Written
from resources.exports.sql import export_rows
from resources.exports.targets import SqlTarget
from resources.label_studio.annotations import AnnotationRow
from resources.label_studio.reviews import Reviews
from resources.postgres import EmbeddedPostgres
from resources.targets import load_targets
from tests.helpers import Asked, chats, ok, python, refusal
from tests.reviewing import read_stars, star

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of this module's own, which may be stopped."""
    with tempfile.TemporaryDirectory(prefix="vb-") as made:
        with EmbeddedPostgres(Path(made) / "data", Path(made) / "run") as started:
            yield started
        if started.socket_dir.exists():
            started.socket_dir.rmdir()


@pytest.fixture
def postgres(server: EmbeddedPostgres) -> Iterator[Connection]:
    connection = psycopg2.connect(server.url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    yield connection
    connection.close()


@pytest.fixture(params=["postgresql", "sqlite"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> SqlTarget:
    """The same promises from both ways of writing."""
    if request.param == "sqlite":
        return table_target(f"sqlite:///{tmp_path}/results.db")
    server: EmbeddedPostgres = request.getfixturevalue("server")
    request.getfixturevalue("postgres")
    return table_target(server.url)


def table_target(url: str, **fields: Any) -> SqlTarget:
    return SqlTarget(name="warehouse", url=SecretStr(url), table="results", **fields)


def query(target: SqlTarget, statement: str) -> list[tuple[Any, ...]]:
    engine = create_engine(target.url.get_secret_value())
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


def quiet(_message: Any) -> None:
    pass


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Two answers and a refusal, in several pieces of one row where a test says so."""
    made = Asked(tmp_path / "asked", chats(3))
    made.run(lambda request: refusal(400) if request.line == 2 else ok(request, f"answer {request.line}"))
    return made


def test_every_published_row_is_in_the_table_as_it_was_published(target: SqlTarget, asked: Asked) -> None:
    written = export_latest(target, asked.batch, quiet)
    assert (written.rows, written.there, written.changed) == (3, 3, True)
    names = ", ".join(asked.rows[0])
    found = query(target, f"SELECT batch, {names}, revision FROM results ORDER BY line")
    revision = Published.of(asked.batch).number
    for row, wanted in zip(found, asked.rows, strict=True):
        assert (row[0], row[-1]) == (asked.batch.key, revision)
        for name, value in zip(wanted, row[1:-1], strict=True):
            if name.endswith("_at") and target.url.get_secret_value().startswith("sqlite"):
                assert value == wanted[name].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
            else:
                assert value == wanted[name], name


def test_a_repeated_export_writes_nothing(target: SqlTarget, asked: Asked) -> None:
    export_latest(target, asked.batch, quiet)
    query(target, "UPDATE results SET text = 'a mark'")
    written = export_latest(target, asked.batch, quiet)
    assert (written.there, written.changed) == (3, False)
    assert query(target, "SELECT DISTINCT text FROM results") == [("a mark",)]


def test_retried_rows_take_the_place_of_their_older_ones(target: SqlTarget, asked: Asked) -> None:
    export_latest(target, asked.batch, quiet)
    asked.run(mode=Mode.RETRY_FAILED)
    assert export_latest(target, asked.batch, quiet).there == 3
    assert query(target, "SELECT line, status_code, text FROM results ORDER BY line") == [
        (1, 200, "answer 1"),
        (2, 200, "fine"),
        (3, 200, "answer 3"),
    ]


def test_rows_of_an_older_revision_that_are_gone_do_not_stay(target: SqlTarget, asked: Asked) -> None:
    rows = Published.of(asked.batch).rows()
    export_rows(target, rows, quiet)
    fewer = revised(rows, [piece.slice(0, 2) for piece in rows.batches()])
    assert export_rows(target, fewer, quiet).there == 2
    assert query(target, "SELECT line FROM results ORDER BY line") == [(1,), (2,)]


def test_an_older_revision_never_takes_the_place_of_a_newer_one(target: SqlTarget, asked: Asked) -> None:
    rows = Published.of(asked.batch).rows()
    export_rows(target, revised(rows, [*rows.batches()]), quiet)
    with pytest.raises(ExportFailed, match="newer than"):
        export_rows(target, rows, quiet)


def test_batches_in_one_table_leave_each_other_alone(target: SqlTarget, asked: Asked, tmp_path: Path) -> None:
    other = Asked(tmp_path / "other", chats(2, "something else"))
    other.run()
    export_latest(target, asked.batch, quiet)
    export_latest(target, other.batch, quiet)
    asked.run(mode=Mode.RETRY_FAILED)
    export_latest(target, asked.batch, quiet)
    found = dict(query(target, "SELECT batch, count(*) FROM results GROUP BY batch"))
    assert found == {asked.batch.key: 3, other.batch.key: 2}


def test_texts_that_databases_trip_over_come_back_as_they_were(target: SqlTarget, tmp_path: Path) -> None:
    """All but U+0000, for which PostgreSQL has no place."""
    texts = ["a\0b", "", "\\N", "\\.", "x\n\\.\ny", 'quo"te\ttab\r', "\N{PILE OF POO}é", "NULL"]
    asked = Asked(tmp_path / "texts", chats(len(texts)))
    asked.run(lambda request: ok(request, texts[request.line - 1]))
    assert export_latest(target, asked.batch, quiet).there == len(texts)
    found = [row[0] for row in query(target, "SELECT text FROM results ORDER BY line")]
    assert found == ["a\N{REPLACEMENT CHARACTER}b", *texts[1:]]
    assert "a\\u0000b" in query(target, "SELECT response FROM results WHERE line = 1")[0][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ALTER TABLE results DROP COLUMN finish_reason", "`results` has no column `finish_reason` "),
        ("ALTER TABLE results ADD COLUMN mine TEXT", "has a column `mine`, which is none of ours"),
    ],
)
def test_a_table_with_other_columns_is_refused_with_the_column_named(
    target: SqlTarget, asked: Asked, change: str, message: str
) -> None:
    export_latest(target, asked.batch, quiet)
    query(target, change)
    with pytest.raises(ExportFailed, match=message):
        export_latest(target, asked.batch, quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ALTER COLUMN status_code TYPE text", "has column `status_code` as TEXT, not SMALLINT"),
        ("DROP CONSTRAINT results_pkey", r"has the primary key \(none\)"),
    ],
)
def test_a_table_of_postgresql_with_other_types_or_keys_is_refused(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked, change: str, message: str
) -> None:
    target = table_target(server.url)
    export_latest(target, asked.batch, quiet)
    query(target, f"ALTER TABLE results {change}")
    with pytest.raises(ExportFailed, match=message):
        export_latest(target, asked.batch, quiet)


def test_a_schema_can_be_named(server: EmbeddedPostgres, postgres: Connection, asked: Asked) -> None:
    target = table_target(server.url, schema="lake")
    with pytest.raises(ExportFailed, match='schema "lake" does not exist'):
        export_latest(target, asked.batch, quiet)
    query(target, "DROP SCHEMA IF EXISTS lake CASCADE; CREATE SCHEMA lake")
    assert export_latest(target, asked.batch, quiet).there == 3
    assert query(target, "SELECT count(*) FROM lake.results") == [(3,)]


def test_rows_of_any_kind_and_key_can_be_written(target: SqlTarget) -> None:
    """A key of another kind, a scope that is the whole table, numbers and truth."""
    schema = pa.schema(
        [("task", pa.int64()), ("rating", pa.float64()), ("edited", pa.bool_()), ("revision", pa.int64())]
    )

    def stars(revision: int, values: list[tuple[int, float | None, bool | None]]) -> Rows:
        rows = [(*value, revision) for value in values]
        piece = pa.RecordBatch.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)
        return Rows(schema, ("task",), {}, revision, len(rows), lambda: iter([piece]))

    export_rows(target, stars(1, [(1, 0.5, True), (2, None, None)]), quiet)
    export_rows(target, stars(2, [(2, 5.0, False), (3, 1.25, True)]), quiet)
    found = query(target, "SELECT task, rating, edited FROM results ORDER BY task")
    assert [(task, rating, bool(edited)) for task, rating, edited in found] == [(2, 5.0, False), (3, 1.25, True)]


def test_gold_stars_are_upserted_and_those_that_are_none_any_more_leave(target: SqlTarget, tmp_path: Path) -> None:
    def put(name: str, *stars: AnnotationRow) -> Written:
        reviews = read_stars(Reviews(tmp_path / "curation", name), *stars)
        return export_rows(target, gold_stars_of(reviews), quiet)

    put("other", star(1))
    assert put("mine", star(1), star(2), star(3, gold=False)).there == 2
    assert not put("mine", star(1), star(2), star(3, gold=False)).changed
    assert put("mine", star(2, rating=None), star(3, final_response="mended")).there == 2
    found = query(
        target, 'SELECT target, annotation, rating, final_response, prompt, "values" FROM results ORDER BY 1, 2'
    )
    assert found == [
        ("mine", 2, None, "a2", "q2", "{}"),
        ("mine", 3, 4.0, "mended", "q3", "{}"),
        ("other", 1, 4.0, "a1", "q1", "{}"),
    ]
    assert put("mine", star(2, gold=False)).there == 0
    assert query(target, "SELECT target FROM results") == [("other",)]


def test_texts_of_gold_stars_lose_what_no_database_takes(target: SqlTarget, tmp_path: Path) -> None:
    reviews = read_stars(Reviews(tmp_path / "curation", "mine"), star(1, prompt="nul \0 here"))
    assert export_rows(target, gold_stars_of(reviews), quiet).there == 1
    assert query(target, "SELECT prompt FROM results") == [("nul \N{REPLACEMENT CHARACTER} here",)]


def test_gold_stars_have_a_table_of_their_own() -> None:
    with pytest.raises(ValueError, match="must be another table"):
        table_target("sqlite://", gold_stars_table="Results")


def test_rows_that_are_not_all_there_are_not_written(target: SqlTarget, asked: Asked) -> None:
    rows = replace(Published.of(asked.batch).rows(), count=4)
    with pytest.raises(ExportFailed, match="3 rows were read where 4 should be"):
        export_rows(target, rows, quiet)
    assert query(target, "SELECT count(*) FROM results") == [(0,)]


def test_a_database_that_goes_away_in_the_middle_has_none_of_the_rows(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked
) -> None:
    target = table_target(server.url)
    export_latest(target, asked.batch, quiet)
    rows = Published.of(asked.batch).rows()
    pieces = [piece.slice(line, 1) for piece in rows.batches() for line in range(3)]
    newer = revised(rows, pieces)

    def cut(message: Any) -> None:
        if message["rows"] == 2:
            with postgres.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'vllm-batch%'"
                )

    with pytest.raises(ExportFailed, match="postgresql:///postgres table results: "):
        export_rows(target, newer, cut)
    assert query(target, "SELECT DISTINCT revision FROM results") == [(rows.revision,)]
    assert export_rows(target, newer, quiet).there == 3


def test_a_database_that_is_stopped_in_the_middle_is_exported_to_when_it_is_back(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked
) -> None:
    target = table_target(server.url)
    with pytest.raises(ExportFailed):
        export_rows(target, Published.of(asked.batch).rows(), lambda _: server.stop())
    with pytest.raises(ExportFailed, match="OperationalError"):
        export_latest(target, asked.batch, quiet)
    server.start()
    assert export_latest(target, asked.batch, quiet).there == 3


_EXPORT = """
import sys, time
from pathlib import Path
from pydantic import SecretStr
from resources.batch_store.store import BatchStore
from resources.exports.export import export_latest
from resources.exports.targets import SqlTarget
def stay(message):
    print("rows are on their way", flush=True)
    time.sleep(600)
target = SqlTarget(name="warehouse", url=SecretStr(sys.argv[1]), table="results")
export_latest(target, BatchStore(Path(sys.argv[2])).get(sys.argv[3]), stay)
"""


def test_an_export_that_is_killed_half_way_is_rolled_back_and_done_by_the_next(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked
) -> None:
    target = table_target(server.url)
    with python("-c", _EXPORT, server.url, asked.folder / "data", asked.batch.key) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "rows are on their way\n"
        process.send_signal(signal.SIGKILL)
    assert query(target, "SELECT count(*) FROM results") == [(0,)]
    assert export_latest(target, asked.batch, quiet).there == 3


def test_two_exports_of_one_batch_at_a_time_leave_each_row_once(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked
) -> None:
    target = table_target(server.url)
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda: done.append(export_latest(target, asked.batch, quiet).there)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [3, 3, 3, 3]


@pytest.mark.parametrize("is_there", [False, True])
def test_what_the_database_refuses_is_told_without_the_row(
    server: EmbeddedPostgres, postgres: Connection, asked: Asked, is_there: bool
) -> None:
    """By COPY into the table, and by the upsert over rows that are there."""
    target = table_target(server.url)
    rows = Published.of(asked.batch).rows()
    export_rows(target, rows, quiet)
    query(target, "ALTER TABLE results ADD CONSTRAINT no_third CHECK (text <> 'answer 3') NOT VALID")
    if not is_there:
        query(target, "DELETE FROM results")
    with pytest.raises(ExportFailed, match=r"CheckViolation.*no_third") as caught:
        export_rows(target, revised(rows, [*rows.batches()]), quiet)
    assert "answer 3" not in str(caught.value)


# --- Secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://somebody:{secret}@127.0.0.1:1/db",
        "postgresql://somebody@127.0.0.1:1/db?password={secret}",
        "postgresql://somebody:{secret}@/db?host=/nowhere&options=%7Bbroken",
    ],
)
def test_no_password_is_in_what_a_failure_says(asked: Asked, url: str) -> None:
    target = table_target(url.format(secret="s3cr%2Ft"))
    with pytest.raises(ExportFailed) as caught:
        export_latest(target, asked.batch, quiet)
    shown = f"{caught.value} {caught.value.__cause__} {target!r}"
    assert "s3cr" not in shown


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{url: 'postgresql://me:pass1@host/db', table: t}", "`exports.x.url` holds a password; put it in a variable"),
        ("{url: '${NO_SUCH}', table: t}", "needs the environment variable NO_SUCH, which is not set"),
        ("{url: '${URL}', table: 't; DROP'}", r"`exports.x.database.table`"),
        ("{url: '${URL}', table: t, colour: red}", "`exports.x.database.colour`"),
        ("{url: 'postgresql://me:${WORD}@host/db', table: t}", "in a password must be written %40"),
        ("{url: 'oracle9://host/db', table: t}", "is no URL of a database"),
        ("{url: 's3://', format: parquet}", "must be s3://bucket/prefix"),
        ("{url: 's3://bucket/../c'}", "a prefix has no empty parts"),
        ("{url: 's3://bucket', format: csv}", "format"),
        ("{url: 's3://key@bucket/x'}", "must be s3://bucket/prefix"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_when_the_file_is_read(
    tmp_path: Path, target: str, message: str
) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(f"exports: {{x: {target}}}")
    with pytest.raises(SettingsError, match=message) as caught:
        load_targets(path, {"URL": "postgresql://me:pass1@host/db", "WORD": "pass1@pass2"})
    assert "pass1" not in str(caught.value)
    assert "pass2" not in str(caught.value)


def test_a_password_comes_from_a_variable_and_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text("exports: {x: {url: 'postgresql://${WHO}:${WORD}@host/db', table: t}}")
    found = load_targets(path, {"WHO": "me", "WORD": "pass1"})
    target = found.exports["x"]
    assert isinstance(target, SqlTarget)
    assert target.url.get_secret_value() == "postgresql://me:pass1@host/db"
    assert "pass1" not in repr(found)


def revised(rows: Rows, pieces: list[pa.RecordBatch]) -> Rows:
    """These rows, as of a later revision."""
    revision = rows.revision + 1
    changed = [
        piece.set_column(
            len(rows.schema) - 1, rows.schema.field("revision"), pa.repeat(pa.scalar(revision), len(piece))
        )
        for piece in pieces
    ]
    return replace(rows, revision=revision, count=sum(map(len, pieces)), batches=lambda: iter(changed))
