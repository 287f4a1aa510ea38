"""The models of the catalog, as assets that are not ours to make: what stands upstream of the answers."""

from collections.abc import Iterable
from pathlib import Path

from dagster import AssetDep, AssetKey, AssetsDefinition, AssetSpec, MetadataValue

from assets.partitions import OWNERS
from resources.engine.catalog import AdapterEntry, ModelEntry, load_catalog
from resources.engine.vllm_server import log_name
from resources.errors import CatalogError

GROUP = "models"


def model_key(entry: ModelEntry) -> AssetKey:
    return AssetKey(["models", log_name(entry.name)])


def model_assets(entries: Iterable[ModelEntry]) -> list[AssetSpec]:
    """An external asset for each model, with what the catalog says of it."""
    return [_spec(entry) for entry in entries]


def catalog_as_it_is(path: Path) -> list[ModelEntry]:
    """The entries of a catalog; none where it cannot be read, which is for the runs to tell."""
    try:
        return list(load_catalog(path).entries.values())
    except CatalogError:
        return []


def downstream_of(asset: AssetsDefinition, models: Iterable[AssetSpec]) -> AssetsDefinition:
    """The same asset, with the models upstream of it."""
    deps = [AssetDep(model.key) for model in models]
    return asset.map_asset_specs(lambda spec: spec.replace_attributes(deps=[*spec.deps, *deps]))


def _spec(entry: ModelEntry) -> AssetSpec:
    facts = {
        "source": entry.adapter if isinstance(entry, AdapterEntry) else entry.source or entry.base_url,
        "revision": entry.revision,
        "aliases": ", ".join(entry.aliases) or None,
        "devices": entry.devices_needed if entry.engine == "vllm" else None,
        "keep_alive_seconds": entry.keep_alive if entry.engine == "vllm" else None,
        "residency": str(entry.residency) if entry.engine == "vllm" else None,
        "concurrency": entry.concurrency,
        "defaults": MetadataValue.json(entry.defaults) if entry.defaults else None,
        "engine_args": MetadataValue.json(entry.engine_args) if entry.engine_args else None,
    }
    base = entry.server_entry
    return AssetSpec(
        model_key(entry),
        deps=[model_key(base)] if base is not entry else [],
        description=f"`{entry.name}` in the model catalog"
        + (f", an adapter over `{base.name}`." if base is not entry else "."),
        group_name=GROUP,
        owners=OWNERS,
        kinds={str(entry.engine)},
        metadata={name: value for name, value in facts.items() if value is not None},
    )
