"""From the body of a line to the body that is sent. Verbatim, unless a default or another model name goes in."""

from collections.abc import Callable
from typing import Any

import msgspec

from resources.batch_format.options import BatchOptions
from resources.engine.catalog import EngineKind, ModelEntry

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.encode


def body_transform(options: BatchOptions, entry: ModelEntry) -> Callable[[bytes], bytes]:
    """The function that is applied to every body. A field of the line stands over a default of the batch, and that
    over a default of the catalog."""
    defaults = {**entry.defaults, **options.defaults}
    renamed = options.model is not None or entry.engine is EngineKind.OPENAI

    def transform(body: bytes) -> bytes:
        document = _decode(body)
        if renamed or "model" not in document:
            document["model"] = entry.served_name
        return _encode({**defaults, **document})

    return transform if defaults or renamed else bytes
