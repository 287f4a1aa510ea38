"""What a `custom_id` such as `ticket-4711-en` says, and what became of that ticket."""

import re
from typing import Any

_CUSTOM_ID = re.compile(r"ticket-(?P<number>\d+)(?:-(?P<language>[a-z]{2}))?$")


def parse_ticket(row: dict[str, Any]) -> tuple[int | None, str | None, str | None, str | None]:
    """Number and language of the ticket (None where its id is none of ours), the answer, the error."""
    found = _CUSTOM_ID.match(row["custom_id"] or "")
    number = int(found["number"]) if found else None
    error = row["error_code"] or (None if row["status_code"] == 200 else str(row["status_code"]))
    return number, found["language"] if found else None, row["text"], error
