"""The partitions that everything about batches hangs on: one a file."""

import warnings

from dagster import DynamicPartitionsDefinition, PreviewWarning

BATCH_FILES = DynamicPartitionsDefinition(name="batch_files")

GROUP = "batches"
REVIEW_GROUP = "reviews"
OWNERS = ["team:llm-batches"]

# A blocking check must be partitioned, or a failed batch is let through as soon as another one passes. Dagster calls
# that a preview, at every load of the definitions; the version is pinned, and the tests show that it works.
warnings.filterwarnings(
    "ignore",
    message="Specifying a partitions_def on an AssetCheckSpec is currently in preview",
    category=PreviewWarning,
)
