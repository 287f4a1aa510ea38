"""A webhook target: where events go, and how. Defined in `targets.yaml`, or by VLLM_BATCH_WEBHOOK_URL."""

import html
import ipaddress
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from yarl import URL

from resources.target import Target
from resources.webhooks.address import is_public
from resources.webhooks.signing import key_of
from resources.webhooks.templates import checked_template

EventType = Literal[
    "batch.completed",
    "batch.failed",
    "batch.cancelled",
    "batch.progress",
    "gold_star.created",
    "gold_star.updated",
    "gold_star.removed",
]
_TOKEN_CHARACTERS = 10
"""A part of a URL's path that is as long may be a secret, and no word."""
ENDINGS: tuple[EventType, ...] = ("batch.completed", "batch.failed", "batch.cancelled")
STARS: tuple[EventType, ...] = ("gold_star.created", "gold_star.updated", "gold_star.removed")


class WebhookTarget(Target):
    """Its URL is a secret like its signing secrets: whoever has a Slack or Discord URL can post there."""

    url: SecretStr = Field(description="Where events are posted to.")
    events: tuple[EventType, ...] = Field(ENDINGS, min_length=1, description="The events that it gets.")
    all_batches: bool = Field(False, description="Hears of every batch, not only of those that name it.")
    secret: tuple[SecretStr, ...] = Field(
        (), description="`whsec_` and base64; several while a secret is replaced: each makes a signature."
    )
    format: Literal["standard", "slack", "discord"] = Field("standard", description="What the body looks like.")
    max_attempts: int = Field(5, ge=1, le=10, description="Times an event is sent before it is a dead letter.")
    timeout: float = Field(30, ge=5, le=300, description="Seconds that an attempt may take in all.")
    include_results: Literal[False, "errors", "all"] = Field(False, description="Result lines in batch.completed.")
    max_payload_bytes: int = Field(
        1024 * 1024, ge=16 * 1024, le=64 * 1024 * 1024, description="Result lines beyond this are left out."
    )
    template: str | None = Field(None, description="Jinja2: the JSON body, or the text for Slack and Discord.")
    progress_seconds: float = Field(60, ge=10, description="batch.progress comes at most this often.")
    allow_insecure: bool = Field(False, description="Allows http:// and private addresses.")
    legacy_signature: bool = Field(False, description="X-Webhook-Signature of the earlier system too.")

    @field_validator("secret", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, (str, SecretStr)) else value

    @field_validator("events", mode="before")
    @classmethod
    def _no_event_twice(cls, value: object) -> object:
        return tuple(dict.fromkeys(map(str, value))) if isinstance(value, list) else value

    @field_validator("template")
    @classmethod
    def _template_is_one(cls, value: str | None) -> str | None:
        return None if value is None else checked_template(value)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        """What can be seen without a look into the name service. No message shows a value."""
        try:
            url = URL(self.url.get_secret_value())
        except ValueError:
            raise ValueError("`url` is no URL") from None
        if url.scheme not in ("https", "http") or not url.host:
            raise ValueError("`url` must begin with https:// and name a host")
        if url.user is not None or url.password is not None:
            raise ValueError("`url` must hold no user and password")
        if url.scheme == "http" and not self.allow_insecure:
            raise ValueError("`url` is http://, which is only taken with `allow_insecure: true`")
        if is_literal(url.host) and not is_public(url.host) and not self.allow_insecure:
            raise ValueError("`url` is a private address, which is only taken with `allow_insecure: true`")
        if self.format == "standard" and not self.secret:
            raise ValueError("needs a `secret` to sign with (only the formats slack and discord go without)")
        for secret in self.secret:
            key_of(secret.get_secret_value(), any_text=self.legacy_signature)
        if self.legacy_signature and not self.secret:
            raise ValueError("`legacy_signature` needs a `secret`")
        return self

    def keys(self) -> list[bytes]:
        """What signatures are made with, in the order of the secrets."""
        return [key_of(secret.get_secret_value(), any_text=self.legacy_signature) for secret in self.secret]

    def wants(self, event: str) -> bool:
        return event in self.events

    @property
    def place(self) -> str:
        """The URL as it may be shown: without its path, which can be a secret."""
        url = URL(self.url.get_secret_value())
        return f"{url.scheme}://{url.host_port_subcomponent}/" + ("" if url.raw_path_qs in ("", "/") else "…")

    def redact(self, text: str) -> str:
        """The text without this target's secrets, however they got into it: as they are, in JSON or in HTML, and the
        parts of the URL that may be one alone."""
        url = URL(self.url.get_secret_value())
        hidden = [self.url.get_secret_value(), str(url), url.raw_path_qs, url.path_qs, url.raw_path, url.path]
        hidden += [part for part in url.parts if len(part) >= _TOKEN_CHARACTERS] + [*url.query.values()]
        hidden += [secret.get_secret_value() for secret in self.secret]
        hidden += [value.removeprefix("whsec_") for value in hidden]
        hidden += [written for value in hidden for written in (value.replace("/", "\\/"), html.escape(value))]
        for value in sorted({value for value in hidden if len(value) > 3}, key=len, reverse=True):
            text = text.replace(value, "***")
        return text


def is_literal(host: str) -> bool:
    """Whether a host is an address, and so goes past the name service."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
