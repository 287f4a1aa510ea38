"""Signatures after the Standard Webhooks specification (standardwebhooks.com, version 1), by its own library."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime

from standardwebhooks import Webhook

_PREFIX = "whsec_"
_KEY_BYTES = range(24, 65)  # what the specification asks for


def key_of(secret: str, any_text: bool = False) -> bytes:
    """The bytes that a secret stands for: `whsec_` and base64 of 24 to 64 bytes.

    With `any_text`, for receivers of the earlier system, a secret without the prefix is its own UTF-8 bytes.

    Raises:
        ValueError: of another form; says how to make one, and does not show it.
    """
    if any_text and secret and not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX) + "==") if secret.startswith(_PREFIX) else b""
    except (binascii.Error, ValueError):
        key = b""
    if len(key) not in _KEY_BYTES:
        raise ValueError(
            "`secret` must be `whsec_` and the base64 of 24 to 64 bytes; this makes one: "
            'echo "whsec_$(openssl rand -base64 32)"'
        )
    return key


def signed_headers(keys: Sequence[bytes], event_id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The three headers of the specification, over `id.timestamp.body`: a signature a key, all in one header."""
    headers = {"webhook-id": event_id, "webhook-timestamp": str(int(at.timestamp()))}
    if keys:
        text = body.decode()
        signatures = [Webhook(key).sign(event_id, at.astimezone(UTC), text) for key in keys]
        headers["webhook-signature"] = " ".join(signatures)
    return headers


def legacy_headers(secret: str, at: datetime, body: bytes) -> dict[str, str]:
    """The two headers of the earlier system: hex HMAC-SHA256 over `timestamp.body`, by the secret as it is written."""
    timestamp = str(int(at.timestamp()))
    signature = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {"X-Webhook-Timestamp": timestamp, "X-Webhook-Signature": f"sha256={signature}"}
