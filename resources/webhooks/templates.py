"""Templates of a target's own: Jinja2 in its sandbox, without a loader, so that one reaches nothing but the event."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _as_it_is(value: Any) -> Any:
    return value


def checked_template(source: str) -> str:
    """The source as it is.

    Raises:
        ValueError: not a Jinja2 template; says which line.
    """
    try:
        _compiled(source, _as_it_is)
    except TemplateError as error:
        raise ValueError(f"is no Jinja2 template: {error}, line {getattr(error, 'lineno', '?')}") from None
    return source


def render(source: str, values: Mapping[str, Any], escape: Callable[[Any], Any] = _as_it_is) -> str:
    """The filled template. `escape` gets every value that is put in, and none of the template's own text.

    Raises:
        ValueError: a value that is not there, or something that the sandbox does not allow.
    """
    try:
        return _compiled(source, escape).render(values)
    except Exception as error:  # a template can make any operation fail
        raise ValueError(f"its template cannot be filled: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=64)
def _compiled(source: str, escape: Callable[[Any], Any]) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=escape, autoescape=False)
    return environment.from_string(source)
