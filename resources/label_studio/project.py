"""The project of a target: found by its name or made, and its label config brought up to date, or refused.

`project.json` in the target's folder remembers which project it is and which label config we gave it last.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources import durable
from resources.errors import CurationError, LabelStudioRefused, ReplyLost
from resources.label_studio.client import LabelStudioClient
from resources.label_studio.connection import Connection
from resources.label_studio.label_config import lost_controls, make_label_config


@dataclass(frozen=True)
class Project:
    id: int
    url: str
    note: str = ""
    """What a person should know, such as a label config that somebody has changed."""


def open_project(client: LabelStudioClient, connection: Connection, folder: Path) -> Project:
    """The project of a target, with a label config that holds what the schema asks.

    A config that a person has changed stays as it is while it holds all controls of the schema.

    Raises:
        CurationError: it lacks controls and has annotations, or the schema's would lose some that are answered.
    """
    wanted = make_label_config(connection.schema)
    known = _read(folder / "project.json")
    found = client.project(known["id"]) if known.get("url") == connection.url and "id" in known else None
    if known.get("title") != connection.project:
        found = None  # the settings name another one now; a project that a person has renamed is still the same
    found = found or client.find_project(connection.project) or _create(client, connection, wanted)
    project_id, note = int(found["id"]), ""
    present = str(found["label_config"])
    is_ours = known.get("id") == project_id and known.get("given") == _digest(present)
    if is_ours and known.get("wanted") == _digest(wanted):
        return _project(connection, project_id)
    if present != wanted:
        is_blank = not _has_content(present)
        if not is_blank and not is_ours and not lost_controls(wanted, present):
            note = "its label config was changed by a person, and stays so: it holds all controls of the schema"
        else:
            present = _change(client, connection, found, wanted)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "url": connection.url,
        "id": project_id,
        "title": connection.project,
        "given": _digest(present) if not note else None,
        "wanted": _digest(wanted),
    }
    durable.write_file(folder / "project.json", json.dumps(record).encode())
    return _project(connection, project_id, note)


def known_project(folder: Path, connection: Connection) -> int | None:
    """The id of the project as of the last import, without asking the server."""
    known = _read(folder / "project.json")
    return int(known["id"]) if known.get("url") == connection.url and "id" in known else None


def _project(connection: Connection, project_id: int, note: str = "") -> Project:
    return Project(project_id, f"{connection.url}/projects/{project_id}/data", note)


def _create(client: LabelStudioClient, connection: Connection, wanted: str) -> dict[str, Any]:
    description = f"{connection.schema.name}. Made by vllm_batch_pipelines."
    try:
        return client.create_project(connection.project, description, wanted)
    except ReplyLost:
        found = client.find_project(connection.project)
        if found is None:
            raise
        return found


def _change(client: LabelStudioClient, connection: Connection, found: dict[str, Any], wanted: str) -> str:
    present = str(found["label_config"])
    has_annotations = bool(found.get("total_annotations_number") or found.get("skipped_annotations_number"))
    lost = lost_controls(present, wanted) if _has_content(present) else []
    if has_annotations and lost:
        raise CurationError(
            f"Project `{connection.project}` has annotations, and the label config of schema "
            f"`{connection.schema.id}` would lose the controls {', '.join(lost)} of the one there. Give the target "
            "another project, or keep these questions in the schema."
        )
    try:
        return str(client.set_label_config(int(found["id"]), wanted)["label_config"])
    except LabelStudioRefused as refused:
        if refused.status != 400:
            raise
        raise CurationError(
            f"Project `{connection.project}`: Label Studio does not take the label config of schema "
            f"`{connection.schema.id}` beside what is annotated there. Give the target another project, or mend the "
            f"schema. {refused}"
        ) from None


def _has_content(config: str) -> bool:
    return "<" in config and "name=" in config


def _digest(config: str) -> str:
    return hashlib.sha256(config.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
