"""Label Studio's API as far as it is needed, over `label-studio-sdk`: its tokens, its transport, and our retries.

The SDK repeats any request by itself, imports too, and so makes tasks twice. Here a request says whether it may be
repeated: reading, and writing that ends in the same state, may be; an import may not, unless it is sure that the server
never saw it. Bodies are taken as JSON: the SDK's models take more time than the server on pages of hundreds of tasks.
"""

import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Self, cast

from resources.errors import LabelStudioDown, LabelStudioRefused, ReplyLost
from resources.label_studio.connection import Connection

log = logging.getLogger(__name__)

Json = dict[str, Any]
Pause = Callable[[float], None]

TRIES = 5
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"


class LabelStudioClient:
    """One server with one token (personal access token or legacy token; the token's form tells which)."""

    def __init__(
        self, connection: Connection, *, tries: int = TRIES, pause: Pause = time.sleep, timeout: float | None = None
    ) -> None:
        """`pause` waits between tries; `timeout` stands over the target's; nothing is sent before the first call."""
        self._timeout = min(timeout or connection.timeout, connection.timeout)
        self._connection = connection
        self._tries = tries
        self._pause = pause
        self._transport: Any = None
        self._http: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. A later call opens them anew."""
        if self._http is not None:
            self._http.close()
        self._http = self._transport = None

    # --- Projects

    def find_project(self, title: str) -> Json | None:
        """The oldest project of exactly that title."""
        found = []
        for page in range(1, 1000):
            reply = self._read("api/projects/", {"title": title, "page": page, "page_size": 100})
            found += [project for project in reply["results"] if project["title"] == title]
            if not reply.get("next"):
                break
        return min(found, key=lambda project: int(project["id"])) if found else None

    def project(self, project_id: int) -> Json | None:
        """A project by its id; None where it is gone."""
        try:
            return self._read(f"api/projects/{project_id}/")
        except LabelStudioRefused as refused:
            if refused.status == 404:
                return None
            raise

    def create_project(self, title: str, description: str, label_config: str) -> Json:
        """A new project. Raises ReplyLost where it may be there already: look for it by its title."""
        body = {"title": title, "description": description, "label_config": label_config}
        return cast(Json, self._call("POST", "api/projects/", body=body, repeatable=False))

    def set_label_config(self, project_id: int, label_config: str) -> Json:
        """Raises LabelStudioRefused where annotations hang on what would be lost."""
        body = {"label_config": label_config}
        return cast(Json, self._call("PATCH", f"api/projects/{project_id}/", body=body))

    # --- Tasks

    def import_tasks(self, project_id: int, tasks: Sequence[Json]) -> list[int] | None:
        """Import a page in one request, all or nothing; the ids in order, or None where the server gives none.

        Raises:
            ReplyLost: the server may have done it, now or in a moment.
            LabelStudioRefused: it did not: the tasks are not as it wants them, or the token may not.
        """
        path = f"api/projects/{project_id}/import"
        params = {"return_task_ids": "true", "commit_to_project": "true"}
        reply = self._call("POST", path, params=params, body=list(tasks), repeatable=False)
        if "import" in reply and "task_count" not in reply:
            reply = self._wait_for_import(project_id, int(reply["import"]))
        ids = reply.get("task_ids")
        return [int(task) for task in ids] if ids and len(ids) == len(tasks) else None

    def tasks(
        self, project_id: int, filters: Sequence[Json], fields: str, *, page_size: int = 1000, heavy: bool = False
    ) -> Iterator[Json]:
        """Tasks that pass all filters, by id. `fields` (names with commas) is what of each; `heavy` allows
        annotations, predictions and drafts among them. Tasks that come or go meanwhile move no other."""
        last = 0
        while True:
            after = task_filter("id", "greater", "Number", last)
            page = self._page(project_id, [*filters, after], "tasks:id", fields, page_size, heavy)["tasks"]
            yield from page
            if len(page) < page_size:
                return
            last = max(int(task["id"]) for task in page)

    def tasks_changed_since(
        self, project_id: int, since: datetime, limit: int, page: int = 1, *, newest_first: bool = False
    ) -> list[Json]:
        """A page of tasks changed at that moment or after it, the oldest change first: `id`, `updated_at` and counts
        of annotations."""
        changed = task_filter(
            "updated_at", "greater_or_equal", "Datetime", since.astimezone(UTC).strftime(_TIME_FORMAT)
        )
        fields = "id,updated_at,total_annotations,cancelled_annotations"
        order = "-tasks:updated_at" if newest_first else "tasks:updated_at"
        found = self._page(project_id, [changed], order, fields, limit, False, page)["tasks"]
        return [{**task, "updated_at": parse_time(task["updated_at"])} for task in found]

    def last_annotated(self, project_id: int) -> datetime | None:
        """When a task that has an annotation was changed last."""
        having = [task_filter("total_annotations", "greater", "Number", 0)]
        tasks = self._page(project_id, having, "-tasks:updated_at", "id,updated_at", 1, False)["tasks"]
        return parse_time(tasks[0]["updated_at"]) if tasks else None

    def count_tasks(self, project_id: int, filters: Sequence[Json]) -> int:
        return int(self._page(project_id, filters, "tasks:id", "id", 1, False)["total"])

    def task(self, task_id: int) -> Json | None:
        """A task with its annotations, predictions and drafts; None where it is gone."""
        try:
            return self._read(f"api/tasks/{task_id}/")
        except LabelStudioRefused as refused:
            if refused.status == 404:
                return None
            raise

    def update_task(self, task_id: int, data: Json, meta: Json) -> None:
        self._call("PATCH", f"api/tasks/{task_id}/", body={"data": data, "meta": meta})

    def delete_task(self, task_id: int) -> None:
        """One that is gone already is fine."""
        try:
            self._call("DELETE", f"api/tasks/{task_id}/")
        except LabelStudioRefused as refused:
            if refused.status != 404:
                raise

    # --- Predictions

    def set_prediction(self, task: Json, prediction: Json | None) -> None:
        """Make this the one prediction of a task that was read just now; None for none."""
        present = sorted(int(found["id"]) for found in task.get("predictions") or [])
        keep = present[:1] if prediction is not None else []
        for prediction_id in present[len(keep) :]:
            try:
                self._call("DELETE", f"api/predictions/{prediction_id}/")
            except LabelStudioRefused as refused:
                if refused.status != 404:
                    raise
        if prediction is None:
            return
        if keep:
            self._call("PATCH", f"api/predictions/{keep[0]}/", body=prediction)
        else:
            body = {**prediction, "task": task["id"]}
            self._call("POST", "api/predictions/", body=body, repeatable=False)

    # --- One request

    def _page(
        self, project_id: int, filters: Sequence[Json], order: str, fields: str, size: int, heavy: bool, page: int = 1
    ) -> Json:
        query = {"filters": {"conjunction": "and", "items": list(filters)}, "ordering": [order]}
        params = {
            "project": project_id,
            "query": json.dumps(query),
            "fields": "all" if heavy else "task_only",
            "include": fields,
            "page": page,
            "page_size": size,
            "resolve_uri": "false",
        }
        try:
            return self._read("api/tasks/", params)
        except LabelStudioRefused as refused:
            if refused.status == 404 and page > 1:  # the end moved towards us
                return {"tasks": [], "total": 0}
            raise

    def _wait_for_import(self, project_id: int, import_id: int) -> Json:
        """The result of an import that the server does later."""
        deadline = time.monotonic() + max(self._connection.timeout, 1) * 10
        pause = 0.1
        while time.monotonic() < deadline:
            found = self._read(f"api/projects/{project_id}/imports/{import_id}/")
            if found["status"] == "completed":
                return found
            if found["status"] == "failed":
                raise LabelStudioRefused(
                    f"{self._connection.url}: import {import_id} of project {project_id} failed: "
                    f"{str(found.get('error'))[:500]}",
                    400,
                )
            self._pause(pause)
            pause = min(pause * 1.5, 5.0)
        raise ReplyLost(f"{self._connection.url}: import {import_id} is not done yet; the next run looks again.")

    def _read(self, path: str, params: Json | None = None) -> Json:
        return cast(Json, self._call("GET", path, params=params))

    def _call(
        self, method: str, path: str, *, params: Json | None = None, body: Any = None, repeatable: bool = True
    ) -> Any:
        """One request; the reply's JSON, None where it has none.

        Raises:
            LabelStudioRefused: it was understood and refused.
            LabelStudioDown: not repeatable for longer than all tries; ReplyLost: it may have been done.
        """
        import httpx
        from label_studio_sdk.core.api_error import ApiError

        where = f"{self._connection.url}: {method} {path}"
        for attempt in range(1, self._tries + 1):
            wait: float | None = None
            try:
                reply = self._sdk_transport().request(
                    path, method=method, params=params, json=body, request_options={"max_retries": 0}
                )
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                trouble = f"{where}: not reached ({_words(error)})"  # nothing was sent, so anything may be sent again
            except httpx.HTTPError as error:
                trouble = f"{where}: no reply ({_words(error)})"
                if not repeatable:
                    raise ReplyLost(f"{trouble}; whether it was done is found out.") from None
            except ApiError as error:  # of the exchange of a personal access token for an access token
                status = error.status_code or 0
                if status not in _TRANSIENT:
                    raise LabelStudioRefused(f"{self._connection.url}: {_refusal(status)}", status) from None
                trouble = f"{where}: {status}"
            except ValueError:  # the same exchange, answered with something that is no JSON
                trouble = f"{where}: the token's exchange was answered with something that is no JSON"
            else:
                if reply.status_code < 300:
                    try:
                        return reply.json() if reply.content else None
                    except ValueError:
                        trouble = f"{where}: answered {reply.status_code} with something that is no JSON"
                        if not repeatable:
                            raise ReplyLost(f"{trouble}; whether it was done is found out.") from None
                elif reply.status_code not in _TRANSIENT:
                    detail = _detail(reply.text)
                    message = f"{where}: {_refusal(reply.status_code)}{detail}"
                    raise LabelStudioRefused(message, reply.status_code)
                else:
                    trouble = f"{where}: {reply.status_code}{_detail(reply.text)}"
                    wait = _retry_after(reply.headers.get("retry-after"))
                    if not repeatable and reply.status_code != 429:
                        raise ReplyLost(f"{trouble}; whether it was done is found out.")
            if attempt < self._tries:
                longest = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                self._pause(min(wait if wait is not None else longest * random.uniform(0.5, 1), _LONGEST_PAUSE_SECONDS))
                log.info("%s; trying again", trouble)
        raise LabelStudioDown(f"{trouble}, {self._tries} times. What is done is kept; run this again.")

    def _sdk_transport(self) -> Any:
        """The SDK's own HTTP client: it knows both kinds of tokens, and exchanges one anew when it runs out.

        Made at the first call: the SDK takes a second to import. Its transport is private to it, and the one way to its
        tokens without its models; the SDK's version is pinned to a narrow range.
        """
        if self._transport is None:
            import httpx
            from label_studio_sdk.client import LabelStudio
            from label_studio_sdk.core.api_error import ApiError

            self._http = httpx.Client(timeout=self._timeout, follow_redirects=False)
            try:
                sdk = LabelStudio(
                    base_url=self._connection.url,
                    api_key=self._connection.api_key.get_secret_value(),
                    timeout=self._timeout,
                    httpx_client=self._http,
                )
            except ApiError as error:  # a token that says itself that it has run out
                status = error.status_code or 401
                raise LabelStudioRefused(f"{self._connection.url}: {_refusal(status)}", status) from None
            self._transport = sdk._client_wrapper.httpx_client
        return self._transport


def task_filter(column: str, operator: str, kind: str, value: Any) -> Json:
    """A filter of the data manager, on a column of tasks or `data.<field>`."""
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


def of_batch(batch: str) -> Json:
    return task_filter("data.batch", "equal", "String", batch)


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _refusal(status: int) -> str:
    reasons = {
        301: "moved: set the address that it is at",
        302: "moved: set the address that it is at",
        401: "the token is not taken: it is wrong or has run out, or legacy tokens are switched off there",
        403: "the token may not do that",
        404: "not there",
        413: "too large for it",
    }
    return f"{status}, {reasons.get(status, 'refused')}"


def _detail(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    words = found.get("validation_errors") or found.get("detail")
    return f": {json.dumps(words, ensure_ascii=False)[:500]}" if words else ""


def _retry_after(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
