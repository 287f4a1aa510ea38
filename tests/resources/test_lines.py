"""Reading lines: plain and compressed, huge and damaged, and what is not a file."""

import gzip
import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from resources.batch_format.lines import MAX_LINE_BYTES, input_suffix, iter_lines, open_regular
from resources.errors import BatchFailed, InputRefused

Pack = Callable[[bytes], bytes]
PACKED: list[tuple[str, Pack]] = [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress)]
every_suffix = pytest.mark.parametrize(("suffix", "pack"), PACKED)


def read(content: bytes, suffix: str = ".jsonl", limit: int = MAX_LINE_BYTES) -> list[tuple[int, bytes | None]]:
    return list(iter_lines(io.BytesIO(content), suffix, limit))


@every_suffix
def test_lines_are_numbered_and_blank_ones_left_out(suffix: str, pack: Pack) -> None:
    content = b"\xef\xbb\xbfone\r\n\n \t\r\n  four  \nfive\r\n\nlast"
    assert read(pack(content), suffix) == [(1, b"one"), (4, b"four"), (5, b"five"), (7, b"last")]


@every_suffix
def test_empty_file_has_no_lines(suffix: str, pack: Pack) -> None:
    assert read(pack(b""), suffix) == []
    assert read(b"", suffix) == []


@every_suffix
def test_parts_that_were_packed_one_by_one_are_all_read(suffix: str, pack: Pack) -> None:
    content = b"".join(pack(b"%d\n" % number) for number in range(1, 500))
    assert read(content, suffix) == [(number, b"%d" % number) for number in range(1, 500)]


@pytest.mark.parametrize(("suffix", "pack"), PACKED[1:])
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_file_cut_short_is_unreadable_input(suffix: str, pack: Pack, kept: float) -> None:
    content = pack(os.urandom(20_000).hex().encode() + b"\n")
    with pytest.raises(BatchFailed, match="Is the file whole") as caught:
        read(content[: int(len(content) * kept)], suffix)
    assert caught.value.code == "unreadable_input"


@pytest.mark.parametrize(("suffix", "pack"), PACKED[1:])
def test_cut_in_a_later_part_names_the_last_whole_line(suffix: str, pack: Pack) -> None:
    content = pack(b"one\ntwo\n") + pack(os.urandom(2000).hex().encode())[:-9]
    with pytest.raises(BatchFailed, match="past line 2"):
        read(content, suffix)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_plain_text_under_a_compressed_name_is_unreadable_input(suffix: str) -> None:
    with pytest.raises(BatchFailed) as caught:
        read(b'{"custom_id":"a"}\n', suffix)
    assert caught.value.code == "unreadable_input"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("first", [b"", b"short\n"])
def test_limit_is_met_exactly(bom: bytes, end: bytes, first: bytes) -> None:
    number = 2 if first else 1
    after = [(number + 1, b"after")] if end else []
    before = [(1, b"short")] if first else []
    for length, wanted in ((99, b"x" * 99), (100, b"x" * 100), (101, None), (102, None), (103, None), (500, None)):
        content = bom + first + b"x" * length + end + (b"after" if end else b"")
        assert read(content, limit=100) == [*before, (number, wanted), *after], length


@every_suffix
def test_line_over_the_limit_is_not_held(suffix: str, pack: Pack) -> None:
    content = io.BytesIO(pack(b"a\n" + b"x" * 80_000_000 + b"\nb\n"))
    tracemalloc.start()
    try:
        found = list(iter_lines(content, suffix, max_line_bytes=1_000_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [(1, b"a"), (2, None), (3, b"b")]
    assert peak < 50_000_000


def test_suffixes() -> None:
    names = {
        "a.jsonl": ".jsonl",
        "a.JSONL.GZ": ".jsonl.gz",
        "a.b.jsonl.zst": ".jsonl.zst",
        "a.json": None,
        "jsonl": None,
    }
    assert {name: input_suffix(Path(name)) for name in names} == names


def test_only_regular_files_are_opened_and_nothing_hangs(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"x")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for path in (
        tmp_path / "link",
        tmp_path / "dangling",
        tmp_path / "fifo",
        tmp_path,
        Path("/dev/zero"),
        tmp_path / "no",
    ):
        with pytest.raises(InputRefused, match=str(path)):
            open_regular(path)
    with open_regular(real) as stream:
        assert stream.read() == b"x"
