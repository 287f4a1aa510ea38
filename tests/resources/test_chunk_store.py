"""The checkpoint: what is committed is whole, is read once, and comes out in input order."""

import random
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from resources import durable, failpoints
from resources.chunk_store.checksum import BLANK, CHECKSUM_KEY, is_intact, sealed
from resources.chunk_store.generation import Generation
from resources.chunk_store.ordered import OrderedRows, ranges_of_lines
from resources.chunk_store.schema import CHUNK, RESULTS, ChunkRow, to_table
from resources.chunk_store.writer import ChunkWriter, write_parquet
from resources.engine.catalog import ModelEntry
from resources.errors import BatchLocked, CheckpointError, ChunkDamaged

ENTRY = ModelEntry(name="org/m", engine="null")
LAST = 1000


def row(line: int, attempt: int = 1, status: int | None = 200, text: str = "") -> ChunkRow:
    body = f'{{"line":{line},"attempt":{attempt},"text":"{text}"}}'.encode() if status else None
    return ChunkRow(line, status, f"r-{line}", body, "stop", None, None, 3, 2, None, 1_000_000, 2_000_000, attempt)


@pytest.fixture
def generation(tmp_path: Path) -> Generation:
    made = Generation.of(tmp_path / "results", ENTRY)
    made.start(ENTRY)
    return made


def writer_of(generation: Generation, chunk_rows: int = 10) -> ChunkWriter:
    """As a new run opens it."""
    generation.remove_superseded()
    return ChunkWriter(generation, generation.committed(LAST), chunk_rows)


def ordered(generations: list[Generation], tmp_path: Path, span: int = 7, last: int = LAST) -> list[tuple[int, int]]:
    """(line, attempt) of the winning rows, in the order in which they come out."""
    scratch = tmp_path / f"scratch-{random.random()}"
    scratch.mkdir()
    rows = OrderedRows(generations, span, scratch)
    tables = [rows.between(index) for index in range(last // span + 1)]
    for table in tables:
        assert table.drop_columns(["source"]).schema.equals(CHUNK)
    table = pa.concat_tables(tables)
    return list(zip(table["line"].to_pylist(), table["attempt"].to_pylist(), strict=True))


def test_what_is_committed_is_known_by_line_to_the_next_run(generation: Generation) -> None:
    writer = writer_of(generation)
    writer.commit([row(7), row(3, status=None), row(900, status=400)])
    writer.commit([row(5, attempt=2)])
    state = generation.committed(LAST)
    assert np.flatnonzero(state.attempts).tolist() == [3, 5, 7, 900]
    assert np.flatnonzero(state.failed).tolist() == [3, 900]
    assert (state.done, state.failures, state.rows, state.prompt_tokens) == (4, 2, 4, 12)


def test_small_chunks_are_merged_as_the_run_goes_and_at_its_end(generation: Generation) -> None:
    writer = writer_of(generation, chunk_rows=10)
    for line in range(1, 26):
        writer.commit([row(line)])
        assert generation.committed(LAST).done == line
    assert len(generation.chunk_numbers()) == 2 + 5
    writer.finish()
    assert len(generation.chunk_numbers()) == 3
    assert np.flatnonzero(generation.committed(LAST).attempts).tolist() == list(range(1, 26))


def test_full_chunks_stay_as_they_are(generation: Generation) -> None:
    writer = writer_of(generation, chunk_rows=4)
    for start in (1, 5, 9):
        writer.commit([row(line) for line in range(start, start + 4)])
    writer.finish()
    assert generation.chunk_numbers() == [0, 1, 2]


def test_small_chunks_of_an_earlier_run_are_merged_by_the_next(generation: Generation) -> None:
    for line in range(1, 4):
        writer_of(generation).commit([row(line)])
    assert len(generation.chunk_numbers()) == 3
    writer_of(generation).finish()
    assert generation.chunk_numbers() == [3]
    assert generation.committed(LAST).done == 3


def test_killed_between_merge_and_removal_every_row_counts_once(generation: Generation, tmp_path: Path) -> None:
    writer = writer_of(generation)
    for line in (1, 2, 3):
        writer.commit([row(line)])
    sources = {path.name: path.read_bytes() for path in generation.folder.glob("chunk-*")}
    writer.finish()
    for name, content in sources.items():
        (generation.folder / name).write_bytes(content)
    assert generation.chunk_numbers() == [0, 1, 2, 3]
    assert ordered([generation], tmp_path) == [(1, 1), (2, 1), (3, 1)]
    assert generation.committed(LAST).done == 3
    generation.remove_superseded()
    assert generation.chunk_numbers() == [3]
    assert generation.committed(LAST).rows == 3
    writer_of(generation).commit([row(4)])
    assert generation.chunk_numbers() == [3, 4]


def test_half_written_files_are_ignored_and_removed(generation: Generation, tmp_path: Path) -> None:
    writer_of(generation).commit([row(1)])
    half = generation.folder / f"{durable.TEMPORARY}abc-chunk-000001.parquet"
    half.write_bytes(b"PAR1 half")
    (generation.folder / "notes.txt").write_text("not ours")
    assert ordered([generation], tmp_path) == [(1, 1)]
    assert generation.committed(LAST).done == 1
    generation.remove_superseded()
    assert not half.exists()
    assert (generation.folder / "notes.txt").exists()


def test_failed_write_leaves_no_chunk(generation: Generation) -> None:
    writer = writer_of(generation)
    writer.commit([row(1)])
    before = sorted(path.name for path in generation.folder.iterdir())
    with pytest.raises(pa.ArrowInvalid):
        writer.commit([row(2)._replace(response=b"\xff")])
    assert sorted(path.name for path in generation.folder.iterdir()) == before
    writer.commit([row(2)])
    assert generation.committed(LAST).done == 2


def test_highest_attempt_wins(generation: Generation, tmp_path: Path) -> None:
    writer_of(generation).commit([row(1, 1, status=500), row(2, 1)])
    writer_of(generation).commit([row(1, 3), row(3, 1)])
    writer_of(generation).commit([row(1, 2, status=500)])
    assert ordered([generation], tmp_path) == [(1, 3), (2, 1), (3, 1)]
    state = generation.committed(LAST)
    assert (int(state.attempts[1]), state.failures) == (3, 0)
    writer_of(generation).finish()
    assert ordered([generation], tmp_path) == [(1, 3), (2, 1), (3, 1)]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_damaged_chunk_is_named_and_nothing_passes_for_an_answer(generation: Generation, content: bytes) -> None:
    writer_of(generation).commit([row(1)])
    generation.chunk_path(0).write_bytes(content)
    with pytest.raises(ChunkDamaged, match=r"chunk-000000\.parquet is damaged"):
        generation.committed(LAST)


def test_every_flipped_bit_and_every_cut_is_seen(generation: Generation) -> None:
    writer_of(generation).commit([row(line, text=f"crc32 of this file with zeros here: {line}") for line in range(30)])
    path = generation.chunk_path(0)
    whole = path.read_bytes()
    generation.verify(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        assert not is_intact(changed), place
        assert not is_intact(whole[:place]), place
    assert not is_intact(whole + b"\0")


def test_damaged_chunk_is_set_aside_by_the_holder_alone(
    generation: Generation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_of(generation, chunk_rows=2)
    for line in (1, 3):
        writer.commit([row(line), row(line + 1)])
    flip(generation.chunk_path(0))
    for read in (lambda: Generation(generation.folder).committed(LAST), lambda: ordered([generation], tmp_path)):
        with pytest.raises(ChunkDamaged):
            read()
    assert generation.chunk_numbers() == [0, 1]
    assert generation.damaged() == [0]
    kept = generation.set_aside(0)
    assert "chunk-000000.parquet is damaged: it is moved to" in caplog.text
    assert (kept.parent.name, kept.exists(), generation.damaged()) == ("damaged", True, [])
    assert np.flatnonzero(generation.committed(LAST).attempts).tolist() == [3, 4]
    assert ordered([generation], tmp_path) == [(3, 1), (4, 1)]


def test_sources_of_a_damaged_merged_chunk_stay(generation: Generation) -> None:
    writer = writer_of(generation)
    for line in (1, 2):
        writer.commit([row(line)])
    sources = {path: path.read_bytes() for path in generation.folder.glob("chunk-*")}
    writer.finish()
    for path, content in sources.items():
        path.write_bytes(content)
    flip(generation.chunk_path(2))
    with pytest.raises(ChunkDamaged):
        generation.remove_superseded()
    generation.set_aside(2)
    generation.remove_superseded()
    assert generation.chunk_numbers() == [0, 1]


def test_damage_is_not_merged_into_a_chunk_that_looks_whole(generation: Generation) -> None:
    writer = writer_of(generation)
    for line in (1, 2):
        writer.commit([row(line)])
    generation.committed(LAST)
    flip(generation.chunk_path(1))
    with pytest.raises(ChunkDamaged):
        writer.finish()
    assert generation.chunk_numbers() == [0, 1]


def test_commit_is_durable_before_it_returns(generation: Generation) -> None:
    writer, steps = writer_of(generation), []
    failpoints.arm(lambda step, path: steps.append((step, path.name)))
    try:
        writer.commit([row(1)])
    finally:
        failpoints.arm(None)
    assert steps == [(step, "chunk-000000.parquet") for step in ("opened", "written", "synced", "renamed", "durable")]


def test_nothing_is_written_once_the_generation_is_not_ours(generation: Generation) -> None:
    def refuse() -> None:
        raise BatchLocked("somebody else's")

    writer_of(generation).commit([row(1)])
    late = ChunkWriter(generation, generation.committed(LAST), 10, refuse)
    with pytest.raises(BatchLocked):
        late.commit([row(2)])
    assert generation.chunk_numbers() == [0]


def flip(path: Path, place: int = -1000, bit: int = 3) -> None:
    """Flip one bit of a file, somewhere in its middle."""
    content = bytearray(path.read_bytes())
    content[max(place, -len(content) // 2)] ^= 1 << bit
    path.write_bytes(content)


def test_chunk_with_other_columns_is_refused(generation: Generation) -> None:
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"line": [1]}).replace_schema_metadata({CHECKSUM_KEY: BLANK}), file)
    generation.chunk_path(0).write_bytes(sealed(file.getvalue()))
    with pytest.raises(CheckpointError, match="other columns"):
        generation.open_chunk(0)


def test_line_that_the_input_does_not_have_is_refused(generation: Generation) -> None:
    writer_of(generation).commit([row(11)])
    with pytest.raises(CheckpointError, match="holds line 11, the input has 10"):
        generation.committed(10)


def test_manifest_tells_the_inputs_and_notes_other_versions(
    generation: Generation, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = generation.manifest() or {}
    assert manifest["fingerprint"] == generation.folder.name
    assert manifest["inputs"]["model"] == "org/m"
    writer_of(generation).commit([row(1)])
    path = generation.folder / "manifest.json"
    path.write_text(path.read_text().replace('"versions": [', '"versions": [{"from_chunk": 0, "vllm": "0.1"}],"x": ['))
    generation.start(ENTRY)
    assert [version["from_chunk"] for version in (generation.manifest() or {})["versions"]] == [0, 1]
    assert "goes on from chunk 1" in caplog.text


@pytest.mark.parametrize("content", ["", '{"format_version": 1, "vers', "[]", '{"versions": []}', '{"versions": 3}'])
def test_damaged_manifest_is_written_anew(
    generation: Generation, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    writer_of(generation).commit([row(1)])
    (generation.folder / "manifest.json").write_text(content)
    generation.start(ENTRY)
    assert "manifest.json is damaged" in caplog.text
    manifest = generation.manifest() or {}
    assert (manifest["inputs"]["model"], manifest["versions"][0]["from_chunk"]) == ("org/m", 1)
    assert generation.committed(LAST).done == 1


@pytest.mark.parametrize("seed", range(8))
def test_rows_come_in_input_order_whatever_order_they_finished_in(
    generation: Generation, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    other = Generation(generation.folder.parent / "other")
    other.folder.mkdir()
    attempts = {line: dice.randint(1, 3) for line in dice.sample(range(1, LAST + 1), dice.randint(1, LAST))}
    for place, share in ((generation, 0), (other, 1)):
        writer = writer_of(place, dice.choice([10, 100, 5000]))
        rows = [row(line, n) for line, last in attempts.items() if line % 2 == share for n in range(1, last + 1)]
        dice.shuffle(rows)
        while rows:
            size = dice.choice([3, 30, 300])
            writer.commit(rows[:size])
            del rows[:size]
        if dice.random() < 0.5:
            writer.finish()
    span = dice.choice([1, 7, 100, 5000, ranges_of_lines([generation, other], LAST)])
    assert ordered([generation, other], tmp_path, span) == sorted(attempts.items())


def test_ranges_bound_memory_and_cover_every_line(generation: Generation) -> None:
    assert ranges_of_lines([], 10**9) >= 10**9 // 512  # so many files are open at once
    writer = writer_of(generation)
    writer.commit([row(line, text="x" * 1_000_000) for line in range(1, 101)])
    assert 2 <= ranges_of_lines([generation], 100) <= 20


def test_chunks_have_the_explicit_schema(generation: Generation) -> None:
    nothing = [None] * 8
    writer_of(generation).commit([ChunkRow(1, None, "r", None, None, "request_timeout", "late", *nothing[:3], 1, 2, 1)])
    assert pq.read_schema(generation.chunk_path(0)).equals(CHUNK)
    assert generation.open_chunk(0).metadata.row_group(0).column(0).compression == "ZSTD"


def test_published_schema_is_the_contract() -> None:
    assert [(field.name, str(field.type)) for field in RESULTS] == [
        ("line", "int64"),
        ("custom_id", "string"),
        ("url", "string"),
        ("model", "string"),
        ("status_code", "int16"),
        ("response", "string"),
        ("text", "string"),
        ("finish_reason", "string"),
        ("error_code", "string"),
        ("error_message", "string"),
        ("prompt_tokens", "int32"),
        ("completion_tokens", "int32"),
        ("cached_tokens", "int32"),
        ("started_at", "timestamp[us, tz=UTC]"),
        ("finished_at", "timestamp[us, tz=UTC]"),
        ("attempt", "int8"),
    ]


def test_rows_open_in_pandas_duckdb_polars_and_pyarrow(tmp_path: Path) -> None:
    table = to_table([row(1), row(2, status=None)])
    for name in ("custom_id", "url", "model", "text"):
        table = table.append_column(name, pa.array(["x", None]))
    for part in (0, 1):
        write_parquet(table.select(RESULTS.names).cast(RESULTS).slice(part, 1), tmp_path / f"part-{part:05d}.parquet")
    pattern = str(tmp_path / "part-*.parquet")
    frame = pd.concat([pd.read_parquet(path) for path in sorted(tmp_path.iterdir())])
    assert frame["line"].tolist() == [1, 2]
    assert str(frame["started_at"].dt.tz) == "UTC"
    assert duckdb.sql(f"select line, status_code from '{pattern}' order by line").fetchall() == [(1, 200), (2, None)]
    assert pl.read_parquet(pattern)["line"].to_list() == [1, 2]
    assert pads.dataset(tmp_path).to_table().schema.equals(RESULTS)
