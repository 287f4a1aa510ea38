"""Gold stars as rows of a table: all that a target's reviews hold at a moment."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from resources.exports.rows import REVISION, Rows
from resources.label_studio.annotations import ANNOTATIONS
from resources.label_studio.reviews import Reviews

TARGET = "target"
EXPORTED = pa.schema([pa.field(TARGET, pa.string(), nullable=False), *ANNOTATIONS, REVISION])
"""The target of the reviews, a row of `gold_stars`, the number of the snapshot that it is of."""
_PIECE_ROWS = 1000


def rows_of(reviews: Reviews) -> Rows:
    """The stars of the snapshot that counts now; there must be one."""
    path = reviews.path("gold_stars")
    stars, number = pq.read_table(path), int(path.parent.name)

    def pieces() -> Iterator[pa.RecordBatch]:
        for piece in stars.to_batches(_PIECE_ROWS):
            if len(piece):
                target = pa.repeat(reviews.target, len(piece))
                revision = pa.repeat(pa.scalar(number, pa.int64()), len(piece))
                yield pa.RecordBatch.from_arrays([target, *piece.columns, revision], schema=EXPORTED)

    return Rows(EXPORTED, (TARGET, "annotation"), {TARGET: reviews.target}, number, len(stars), pieces)
