"""One asset for each class in VLLM_BATCH_RESULT_HANDLERS, after those that it names."""

from collections.abc import Sequence

from dagster import AssetExecutionContext, AssetKey, AssetsDefinition, MaterializeResult, asset

from assets.partitions import AFTER_OUTPUT, BATCH_FILES, GROUP, OWNERS
from assets.reporting import failures_for_people
from resources.batch_store.resource import BatchStoreResource
from resources.child import call_in_child
from resources.errors import BatchError
from resources.handlers.loading import HandlerClass, usable_handlers


def handler_assets(paths: Sequence[str], timeout_seconds: float) -> list[AssetsDefinition]:
    """The assets of these classes (`module:Class`), without those that cannot be used."""
    handlers = usable_handlers(paths)
    keys = {handler.name: f"handler_{handler.slug}" for handler in handlers}
    return [_handler_asset(handler, keys, timeout_seconds) for handler in handlers]


def _handler_asset(handler: HandlerClass, keys: dict[str, str], timeout_seconds: float) -> AssetsDefinition:
    @asset(
        name=keys[handler.name],
        deps=[AssetKey("batch_output"), *(AssetKey(keys[name]) for name in handler.after)],
        partitions_def=BATCH_FILES,
        group_name=GROUP,
        owners=OWNERS,
        kinds={"python"},
        automation_condition=AFTER_OUTPUT,
        description=f"The handler {handler.name} (`{handler.path}`), in a process of its own.",
    )
    def handle(context: AssetExecutionContext, store: BatchStoreResource) -> MaterializeResult:  # type: ignore[type-arg]
        arguments = {"data_root": store.data_root, "key": context.partition_key, "path": handler.path}
        with failures_for_people(context):
            try:
                result = call_in_child(
                    "resources.handlers.handling:handle_batch", arguments, silent_seconds=timeout_seconds
                )
            except BatchError as error:
                raise BatchError(f"{handler.name} did not handle {context.partition_key}: {error}") from None
        note = "handled" if result["handled"] else "not enabled for this batch"
        context.log.info(f"{handler.name}: {note}")
        return MaterializeResult(metadata={"handler": handler.path, "note": note})

    return handle
