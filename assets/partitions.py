"""The partitions that everything about batches hangs on: one a file."""

from dagster import DynamicPartitionsDefinition

BATCH_FILES = DynamicPartitionsDefinition(name="batch_files")

GROUP = "batches"
OWNERS = ["team:llm-batches"]
