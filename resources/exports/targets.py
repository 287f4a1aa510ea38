"""Where results can be exported to: the section `exports` of the targets file.

exports:
  lake: {url: s3://bucket/batches, format: parquet}
  warehouse: {url: "postgresql://${DB_USER}:${DB_PASSWORD}@db.example.org/llm", table: results, schema: public}
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Discriminator, Field, SecretStr, Tag, ValidationInfo, field_validator

from resources.target import Target

OBJECT_STORES = ("s3", "gs")
_IDENTIFIER = r"^[A-Za-z_][A-Za-z0-9_]{0,62}$"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}")


class ObjectStoreTarget(Target):
    """A bucket. Credentials come from the environment, as the store's own tools read them: for `s3://` the `AWS_*`
    variables, profile or role; for `gs://` the application default credentials."""

    url: str = Field(description="s3://bucket/prefix or gs://bucket/prefix.")
    endpoint_url: str | None = Field(
        None, pattern=r"^https?://[^/@\s]+/?$", description="Another server that speaks the protocol, such as MinIO."
    )
    region: str | None = Field(None, min_length=1, description="Region of an S3 bucket. Default: AWS_DEFAULT_REGION.")
    format: Literal["parquet", "jsonl", "both"] = Field("both", description="Which of the published files to upload.")
    timeout: float = Field(300, gt=0, le=86_400, description="Seconds without any progress after which it is given up.")

    @field_validator("url")
    @classmethod
    def _bucket_and_prefix(cls, value: str) -> str:
        found = urlsplit(value)
        if not _BUCKET.fullmatch(found.netloc) or found.query or found.fragment:
            raise ValueError("must be s3://bucket/prefix or gs://bucket/prefix, without credentials")
        if any(part in ("", ".", "..") for part in found.path.strip("/").split("/")) and found.path.strip("/"):
            raise ValueError("a prefix has no empty parts and no dots")
        return value

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    @property
    def root(self) -> str:
        """`bucket/prefix`, without a slash at the end."""
        found = urlsplit(self.url)
        return f"{found.netloc}/{found.path.strip('/')}".rstrip("/")


class SqlTarget(Target):
    """A table, in any database that SQLAlchemy speaks to."""

    model_config = ConfigDict(populate_by_name=True)

    url: SecretStr = Field(description="SQLAlchemy's URL of the database.")
    table: str = Field(pattern=_IDENTIFIER, description="Made where it is missing.")
    table_schema: str | None = Field(None, alias="schema", pattern=_IDENTIFIER, description="Must be there.")
    gold_stars_table: str | None = Field(
        None, pattern=_IDENTIFIER, description="Another table, for the gold stars of all reviews."
    )
    timeout: float = Field(
        1800, gt=0, le=86_400, description="Seconds without any progress after which it is given up."
    )

    @field_validator("gold_stars_table")
    @classmethod
    def _another_table(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value.lower() == str(info.data.get("table")).lower():
            raise ValueError("must be another table than `table`, which holds results")
        return value

    @field_validator("url")
    @classmethod
    def _known_to_sqlalchemy(cls, value: SecretStr) -> SecretStr:
        # Not at the top: whoever has no such target need not wait for the import.
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            url = make_url(value.get_secret_value())
            url.get_dialect().import_dbapi()
        except (SQLAlchemyError, ValueError):
            raise ValueError(
                "is no URL of a database, as in postgresql://user:password@host/database, or of an unknown kind"
            ) from None
        except ImportError as error:
            raise ValueError(f"the driver of this database is not installed: {error.name}") from None
        if "@" in (url.host or ""):  # the end of a password, which would be shown as a part of the host
            raise ValueError("has two `@`: the one in a password must be written %40")
        return value


def _kind(value: Any) -> str:
    url = value.get("url") if isinstance(value, dict) else getattr(value, "url", "")
    return "object_store" if str(url).partition("://")[0] in OBJECT_STORES else "database"


ExportTarget = Annotated[
    Annotated[ObjectStoreTarget, Tag("object_store")] | Annotated[SqlTarget, Tag("database")], Discriminator(_kind)
]
