"""One event to a receiver that misbehaves: what is tried again, what is final, and where nothing may go."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook

from resources.webhooks.address import is_public
from resources.webhooks.sender import LONGEST_WAIT_SECONDS, Outcome, Sender
from resources.webhooks.target import WebhookTarget
from tests.receiver import SECRET, Receiver, Say, closed_port

BODY = b'{"type":"batch.completed"}'


def target(url: str, **fields: Any) -> WebhookTarget:
    return WebhookTarget(**{"name": "ops", "url": url, "secret": SECRET, "allow_insecure": True} | fields)


class Waits:
    """Pauses that take no time, written down."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def send(to: WebhookTarget, waits: Waits | None = None, **seams: Any) -> Outcome:
    async def once() -> Outcome:
        async with Sender(pause=waits or Waits(), **seams) as sender:
            return await sender.send(to, "msg_1", BODY)

    return asyncio.run(once())


# --- What is tried again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [408, 425, 429, 500, 502, 503, Say(status=None)])
def test_a_passing_fault_is_tried_again_with_the_same_id_and_bytes(fault: Say | int) -> None:
    with Receiver([fault, fault]) as receiver:
        outcome = send(target(receiver.url))
    assert outcome.delivered
    assert [attempt.error is None for attempt in outcome.attempts] == [False, False, True]
    assert receiver.ids == ["msg_1"] * 3
    assert [received.body for received in receiver.received] == [BODY] * 3
    for received in receiver.received:
        Webhook(SECRET).verify(received.body, received.headers)


@pytest.mark.parametrize("status", [300, 301, 302, 307, 308, 400, 401, 403, 404, 410, 422])
def test_any_other_status_is_final(status: int) -> None:
    with Receiver(otherwise=Say(status, {"Location": "http://169.254.169.254/"}, b"no such hook")) as receiver:
        outcome = send(target(receiver.url))
    assert not outcome.delivered
    assert len(receiver.received) == 1
    assert [attempt.status for attempt in outcome.attempts] == [status]
    assert f"HTTP {status}: " in (outcome.error or "")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_success(status: int) -> None:
    with Receiver(otherwise=Say(status)) as receiver:
        assert send(target(receiver.url)).delivered


def test_a_redirect_is_not_followed() -> None:
    with Receiver() as elsewhere, Receiver(otherwise=Say(307, {"Location": elsewhere.url})) as receiver:
        outcome = send(target(receiver.url))
    assert elsewhere.received == []
    assert outcome.error == "HTTP 307: redirects are not followed"


def test_a_receiver_that_is_down_is_tried_max_attempts_times_with_growing_pauses() -> None:
    waits = Waits()
    outcome = send(target(f"http://127.0.0.1:{closed_port()}/", max_attempts=10), waits)
    assert len(outcome.attempts) == 10
    assert {attempt.status for attempt in outcome.attempts} == {None}
    for place, seconds in enumerate(waits.seconds):
        assert 0.5 <= seconds / min(2**place, 60) <= 1.5
    assert len(set(waits.seconds)) == 9


def test_a_slow_receiver_is_left_after_the_timeout() -> None:
    with Receiver(otherwise=Say(waits=True)) as receiver:
        slow = target(receiver.url, max_attempts=1).model_copy(update={"timeout": 0.2})
        outcome = send(slow)
    assert outcome.error == "no answer within 0.2 s"


def test_a_receiver_that_drips_is_left_after_the_timeout_too() -> None:
    """The time is that of the whole attempt, not of one read."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"." * 1000:
                    connection.sendall(bytes([byte]))
                    if left.wait(0.02):
                        return

        left = threading.Event()
        threading.Thread(target=drip, daemon=True).start()
        slow = target(f"http://127.0.0.1:{server.getsockname()[1]}/", max_attempts=1)
        outcome = send(slow.model_copy(update={"timeout": 0.3}))
        left.set()
    assert outcome.error == "no answer within 0.3 s"


# --- Retry-After ----------------------------------------------------------------------------------------------------


def _in(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "at_least", "at_most"),
    [
        (lambda: "7", 7, 8),
        (lambda: "2.5", 2.5, 3.5),
        (lambda: _in(60), 57, 61),
        (lambda: _in(-60), 0.5, 1.5),
        (lambda: "-5", 0.5, 1.5),
        (lambda: "soon", 0.5, 1.5),
        (lambda: "nan", 0.5, 1.5),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(value: Callable[[], str], at_least: float, at_most: float, status: int) -> None:
    waits = Waits()
    with Receiver([Say(status, {"Retry-After": value()})]) as receiver:
        assert send(target(receiver.url), waits).delivered
    (seconds,) = waits.seconds
    assert at_least <= seconds <= at_most


@pytest.mark.parametrize("value", [str(int(LONGEST_WAIT_SECONDS) + 1), "1e400", _in(7200)])
def test_a_receiver_that_asks_for_too_long_is_not_waited_for_and_not_sent_to_earlier(value: str) -> None:
    waits = Waits()
    with Receiver(otherwise=Say(429, {"Retry-After": value})) as receiver:
        outcome = send(target(receiver.url), waits)
    assert not outcome.delivered
    assert (len(receiver.received), waits.seconds) == (1, [])
    assert "asks to be left alone" in (outcome.error or "")


# --- Where nothing may go -------------------------------------------------------------------------------------------


class Names(AbstractResolver):
    """A name service that says what a test wants, each time something else."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        address = self.answers.pop(0)
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0},
        ]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1"),
        *("fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:102:304::80ff:fffe", "2001:db8::1"),
    ],
)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_a_public_address_is_taken(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1"])
def test_a_name_that_leads_to_a_private_address_is_refused_at_once(address: str) -> None:
    names = Names(address)
    outcome = send(target("https://internal.example.org/", allow_insecure=False), resolver=lambda: names)
    assert len(outcome.attempts) == 1
    assert "not public" in (outcome.error or "")
    assert names.asked == ["internal.example.org"]


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "127.1", "127.0.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001"),
        *("127.000.000.001", "127.0.0.1.", "2130706433.", "0"),
    ],
)
def test_other_spellings_of_loopback_are_refused(host: str) -> None:
    with Receiver() as receiver:
        outcome = send(target(f"https://{host}:{receiver.port}/", allow_insecure=False))
    assert len(outcome.attempts) == 1
    assert "not public" in (outcome.error or "") or "not a canonical IPv4 address" in (outcome.error or "")
    assert receiver.received == []


def test_a_name_that_is_rebound_gains_nothing() -> None:
    """Public (here: 127.0.0.2) when it is first resolved, private a moment later: each connection goes where it was
    checked, and the second attempt is refused."""
    with Receiver(host="127.0.0.2", otherwise=Say(500)) as public, Receiver() as private:
        names = Names("127.0.0.2", "127.0.0.1", "127.0.0.1")
        url = f"https://rebound.example.org:{public.port}/"
        to = target(url, allow_insecure=False)
        outcome = send(to, resolver=lambda: names, allowed=lambda address: address == "127.0.0.2")
    assert private.received == []
    assert len(outcome.attempts) == 2
    assert names.asked == ["rebound.example.org"] * 2  # once for each attempt
    assert "not public" in (outcome.error or "")


def test_tls_and_host_keep_the_name_while_the_connection_goes_to_the_checked_address(tmp_path: Path) -> None:
    server_side, client_side = certificates(tmp_path, "hooks.example.org")
    with Receiver(host="127.0.0.2", tls=server_side) as receiver:
        to = target(f"https://hooks.example.org:{receiver.port}/in", allow_insecure=False)
        names = Names("127.0.0.2")
        outcome = send(to, resolver=lambda: names, allowed=lambda address: address == "127.0.0.2", tls=client_side)
    assert outcome.delivered, outcome.error
    assert receiver.received[0].headers["host"] == f"hooks.example.org:{receiver.port}"


def test_a_certificate_for_another_name_is_not_taken(tmp_path: Path) -> None:
    server_side, client_side = certificates(tmp_path, "other.example.org")
    with Receiver(tls=server_side) as receiver:
        to = target(f"https://hooks.example.org:{receiver.port}/", max_attempts=1)
        outcome = send(to, resolver=lambda: Names("127.0.0.1"), tls=client_side)
    assert "certificate" in (outcome.error or "")
    assert receiver.received == []


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as receiver, Receiver() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert send(target(receiver.url)).delivered
    assert proxy.received == []


def certificates(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's side of TLS for one name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "both.pem").write_bytes(private + pem)
    (folder / "certificate.pem").write_bytes(pem)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(folder / "both.pem")
    return server_side, ssl.create_default_context(cafile=str(folder / "certificate.pem"))


# --- What a receiver may say ----------------------------------------------------------------------------------------


def test_of_a_body_without_end_only_the_beginning_is_read() -> None:
    """Compressed, it would be one bomb more; it is not unpacked."""
    sent = 0
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pour() -> None:
            nonlocal sent
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Encoding: gzip\r\nContent-Length: 99999999999\r\n\r\n")
                while sent < 1 << 30:
                    sent += connection.send(b"endless words " * 5000)

        pouring = threading.Thread(target=pour)
        pouring.start()
        outcome = send(target(f"http://127.0.0.1:{server.getsockname()[1]}/"))
        pouring.join(30)
    assert (outcome.error or "").startswith("HTTP 400: endless words endless words")
    assert len(outcome.error or "") <= 200
    assert sent < 1 << 26


def test_headers_without_end_are_a_fault_like_any_other() -> None:
    with Receiver(otherwise=Say(200, {"X-Long": "x" * 100_000})) as receiver:
        outcome = send(target(receiver.url, max_attempts=2))
    assert (outcome.delivered, len(outcome.attempts)) == (False, 2)
    assert len(outcome.error or "") <= 200


def test_what_a_receiver_says_cannot_steer_a_terminal_or_begin_a_line() -> None:
    with Receiver(otherwise=Say(400, body="no\r\n2026 all is well\x1b[2J\x9b1m\u202e!".encode())) as receiver:
        outcome = send(target(receiver.url))
    assert outcome.error == "HTTP 400: no 2026 all is well [2J 1m !"


# --- Secrets --------------------------------------------------------------------------------------------------------


def test_a_receiver_that_repeats_the_secrets_does_not_bring_them_into_a_message() -> None:
    with Receiver() as receiver:
        url = f"{receiver.url}/services/very-secret?token=also-secret"
        receiver.otherwise = Say(400, body=f"you said {url} {SECRET} and {'x' * 160} {SECRET}".encode())
        outcome = send(target(url))
    assert "you said *** ***" in (outcome.error or "")
    for secret in ("very-secret", "also-secret", SECRET, SECRET.removeprefix("whsec_")[:8]):
        assert secret not in f"{outcome}"


@pytest.mark.parametrize(
    "said",
    [
        '{"url": "http:\\/\\/example.org\\/services\\/very-secret?token=also-secret&b=1"}',
        "no token also-secret here",
        "unknown hook: very-secret",
        "<p>/services/very-secret?token=also-secret&amp;b=1</p>",
        "x" * 2030 + "\n/services/very-secret?token=also-secret",
        " " * 2028 + "/services/very-secret?token=also-secret",
    ],
)
def test_a_part_of_a_secret_url_in_another_writing_is_not_shown_either(said: str) -> None:
    to = target("http://example.org/services/very-secret?token=also-secret&b=1")
    with Receiver(otherwise=Say(404, body=said.encode())) as receiver:
        names = Names("127.0.0.1")
        url = to.url.get_secret_value().replace("example.org", f"example.org:{receiver.port}")
        outcome = send(target(url), resolver=lambda: names)
    assert (outcome.error or "").startswith("HTTP 404")
    assert "secret" not in (outcome.error or "")
    assert "very-" not in (outcome.error or "")


def test_a_secret_that_comes_in_two_pieces_is_not_shown_by_halves() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/services/very-secret"

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\nno /services/very-sec")
                half.wait(20)
                connection.sendall(b"ret here")

        half = threading.Event()
        threading.Thread(target=answer, daemon=True).start()
        threading.Timer(0.3, half.set).start()
        outcome = send(target(url))
    assert outcome.error == "HTTP 400: no *** here"


def test_old_and_new_secret_and_the_earlier_signature_are_all_sent() -> None:
    with Receiver() as receiver:
        send(target(receiver.url, secret=[SECRET, "whsec_" + "A" * 32], legacy_signature=True))
    (received,) = receiver.received
    Webhook(SECRET).verify(received.body, received.headers)
    Webhook("whsec_" + "A" * 32).verify(received.body, received.headers)
    assert received.headers["x-webhook-signature"].startswith("sha256=")
