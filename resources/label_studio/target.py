"""A Label Studio project as `targets.yaml` names it."""

from pydantic import ConfigDict, Field, SecretStr

from resources.target import Target


class ReviewTarget(Target):
    """A Label Studio project in which people review results. What is left out is taken from the settings."""

    model_config = ConfigDict(populate_by_name=True)

    curation_schema: str = Field(
        "generic", alias="schema", min_length=1, description="A schema that is shipped, or the path of a YAML file."
    )
    project: str | None = Field(None, min_length=1, max_length=50, description="The project's title; made where none.")
    url: str | None = Field(None, pattern=r"^https?://[^\s/]", description="Address of the server.")
    api_key: SecretStr | None = Field(None, description="Personal access token or legacy token.")
    timeout: float = Field(60, gt=0, le=600, description="Seconds that one request may take.")
