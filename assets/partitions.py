"""The partitions that everything about batches hangs on: one a file."""

import warnings

from dagster import AutomationCondition, DynamicPartitionsDefinition, PreviewWarning

BATCH_FILES = DynamicPartitionsDefinition(name="batch_files")

GROUP = "batches"
REVIEW_GROUP = "reviews"
OWNERS = ["team:llm-batches"]

# For what comes after the outputs: as soon as they are there and hold every line, and again when they are made anew.
AFTER_OUTPUT = AutomationCondition.eager() & AutomationCondition.all_deps_blocking_checks_passed()

# A blocking check must be partitioned, or a failed batch is let through as soon as another one passes. Dagster calls
# that a preview, at every load of the definitions; the version is pinned, and the tests show that it works.
warnings.filterwarnings(
    "ignore",
    message="Specifying a partitions_def on an AssetCheckSpec is currently in preview",
    category=PreviewWarning,
)
