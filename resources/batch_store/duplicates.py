"""Requests that are asked once for many lines: the same body to the same endpoint, with a deterministic answer.

The first line of such a group, the leader, is asked. The others get copies of its row.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from resources.batch_store.requests import ValidRow
from resources.chunk_store.schema import ChunkRow
from resources.chunk_store.writer import MAX_CHUNK_BYTES

_SAMPLED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
"""Endpoints whose answers are sampled; embeddings, scores and ranks are not."""
_DIGEST_BYTES = 16
_COPIES_AT_ONCE = 4096
_MAX_INT8 = 127


class _Sampling(msgspec.Struct):
    temperature: Any = None
    seed: Any = None


_decode = msgspec.json.Decoder(_Sampling).decode


def is_deterministic(url: str, body: bytes) -> bool:
    """Whether the same request gets the same answer: `temperature` 0 or a `seed`, or nothing is sampled at all.

    A body that says nothing of its temperature is sampled: the engine's default is not 0."""
    if url not in _SAMPLED:
        return True
    sampling = _decode(body)
    greedy = type(sampling.temperature) in (int, float) and sampling.temperature == 0
    return greedy or type(sampling.seed) is int


class Duplicates:
    """The groups among the rows of one dispatch. `copied` and `copies_failed` count the copies committed so far.

    Memory: 24 bytes a deterministic line while groups are looked for, about 50 for the moment of sorting; then 8 bytes
    a copy and 24 a group. Bodies are told apart by 128 bits of BLAKE2b.
    """

    def __init__(self, rows: Iterable[ValidRow]) -> None:
        """`rows` are those that would be asked, in line order, with the bodies as they would be sent."""
        self.copied = self.copies_failed = 0
        lines, digests = array("q"), bytearray()
        for line, url, body in rows:
            if is_deterministic(url, body):
                digest = blake2b(url.encode() + b"\0", digest_size=_DIGEST_BYTES)
                digest.update(body)
                digests += digest.digest()
                lines.append(line)
        order, repeats = _sorted(digests)
        del digests
        grouped = np.frombuffer(lines, np.int64)[order]
        del order, lines
        firsts = np.flatnonzero(~repeats)
        sizes = np.diff(firsts, append=len(grouped)) - 1
        leaders, sizes = grouped[firsts[sizes > 0]], sizes[sizes > 0]
        by_line = np.argsort(leaders)
        self.followers = grouped[repeats]
        """The lines that are not asked, group by group."""
        self._leaders = leaders[by_line]
        self._ends = np.cumsum(sizes)[by_line]
        self._starts = self._ends - sizes[by_line]

    def commit(
        self,
        rows: list[ChunkRow],
        attempts: npt.NDArray[np.int8],
        chunk_rows: int,
        commit: Callable[[list[ChunkRow]], None],
    ) -> None:
        """Commit rows with their copies, a chunk at a time. `attempts` is how often each line was answered before."""
        chunk: list[ChunkRow] = []
        size = 0
        for row in self._with_copies(rows, attempts):
            if chunk and (len(chunk) >= chunk_rows or size + row.nbytes > MAX_CHUNK_BYTES):
                commit(chunk)
                chunk, size = [], 0
            chunk.append(row)
            size += row.nbytes
        if chunk:
            commit(chunk)

    def _with_copies(self, rows: list[ChunkRow], attempts: npt.NDArray[np.int8]) -> Iterator[ChunkRow]:
        lines = np.array([row.line for row in rows], np.int64)
        found = np.searchsorted(self._leaders, lines, "left")
        ends = np.searchsorted(self._leaders, lines, "right")
        for row, group, leads in zip(rows, found.tolist(), (ends > found).tolist(), strict=True):
            yield row
            if leads:
                for start in range(self._starts[group], self._ends[group], _COPIES_AT_ONCE):
                    followers = self.followers[start : min(start + _COPIES_AT_ONCE, self._ends[group])]
                    for line, before in zip(followers.tolist(), attempts[followers].tolist(), strict=True):
                        self.copied += 1
                        self.copies_failed += row.failed
                        yield _copy(row, line, min(before + 1, _MAX_INT8))


def _sorted(digests: bytearray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The order that puts equal digests together, each group in its first order; and which repeat the one before."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    repeats = np.ones(len(order), np.bool_)
    repeats[:1] = False
    for half in range(2):
        column = halves[order, half]
        repeats[1:] &= column[1:] == column[:-1]
    return order, repeats


def _copy(row: ChunkRow, line: int, attempt: int) -> ChunkRow:
    """Without tokens, so that sums over rows are what the engine really did."""
    return row._replace(line=line, attempt=attempt, prompt_tokens=0, completion_tokens=0, cached_tokens=0)
