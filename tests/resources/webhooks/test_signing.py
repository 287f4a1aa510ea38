"""Signatures: the reference vectors of the specification, its own library, and an HMAC made here."""

import base64
import hashlib
import hmac
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from resources.webhooks.signing import key_of, legacy_headers, signed_headers
from tests.receiver import SECRET

OTHER = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BODY = b'{"test": 2432232314}'


def test_the_reference_vector_of_the_specification() -> None:
    at = datetime.fromtimestamp(1614265330, UTC)
    assert signed_headers([key_of(SECRET)], "msg_p5jXN8AQM9LWM0D4loKWxJek", at, BODY) == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_signature_is_an_hmac_over_id_time_and_bytes() -> None:
    body = '{"name":"Zoë","escaped":"\\ud83d"}'.encode()
    headers = signed_headers([key_of(OTHER)], "msg_1", datetime.fromtimestamp(1700000000.9, UTC), body)
    digest = hmac.new(bytes(range(32)), b"msg_1.1700000000." + body, hashlib.sha256).digest()
    assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


@pytest.mark.parametrize("known", [SECRET, OTHER])
def test_while_a_secret_is_replaced_receivers_with_either_verify(known: str) -> None:
    headers = signed_headers([key_of(OTHER), key_of(SECRET)], "msg_1", datetime.now(UTC), BODY)
    assert Webhook(known).verify(BODY, headers) == {"test": 2432232314}


def test_a_changed_body_does_not_verify() -> None:
    headers = signed_headers([key_of(SECRET)], "msg_1", datetime.now(UTC), BODY)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(BODY.replace(b"2", b"3"), headers)


def test_receivers_of_the_earlier_system_verify() -> None:
    headers = legacy_headers("old secret", datetime.fromtimestamp(1700000000, UTC), BODY)
    digest = hmac.new(b"old secret", b"1700000000." + BODY, hashlib.sha256).hexdigest()
    assert headers == {"X-Webhook-Timestamp": "1700000000", "X-Webhook-Signature": f"sha256={digest}"}


@pytest.mark.parametrize(
    "secret", ["", "hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_***", SECRET.removeprefix("whsec_")]
)
def test_a_secret_of_another_form_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="openssl rand") as caught:
        key_of(secret)
    assert secret in ("", "whsec_") or secret not in str(caught.value)
