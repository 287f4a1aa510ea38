"""Handlers of one's own, written against the earlier plug-in interface: classes that the settings name.

class Archive:
    def name(self) -> str: ...                                   # names it for people, and for `after` of others
    def enabled(self, metadata) -> bool: ...                     # whether it wants this batch
    def handle(self, batch_id, results, metadata) -> bool: ...   # True when it is done, and nothing else
    def on_error(self, batch_id, error, metadata): ...           # optional: `handle` raised
    def after(self) -> list[str]: ...                            # optional: names of handlers that come first
"""

import importlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from resources.errors import HandlerRefused

log = logging.getLogger(__name__)

_SETTING = "VLLM_BATCH_RESULT_HANDLERS"
_METHODS = ("name", "enabled", "handle")


@dataclass(frozen=True)
class HandlerClass:
    """`path` is `module:Class`; `after` has the names of the handlers that come before it."""

    path: str
    name: str
    after: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name in letters, digits and underscores."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


def load_handlers(paths: Sequence[str]) -> list[HandlerClass]:
    """The handlers of the setting, each after those it names.

    Raises:
        HandlerRefused: a class that cannot be had or lacks a method, a name that stands twice or that nobody has, a
            circle; says which.
    """
    found = [_described(path) for path in paths]
    slugs = [handler.slug for handler in found]
    for handler in found:
        if not handler.slug or slugs.count(handler.slug) > 1:
            what = f"{_SETTING}: {handler.path}: the name {handler.name!r} is empty or stands twice."
            raise HandlerRefused(what, handler.path)
    by_name = {handler.name: handler for handler in found}
    for handler in found:
        for name in handler.after:
            if name not in by_name:
                known = ", ".join(sorted(by_name))
                what = f"{_SETTING}: {handler.name} is to come after {name!r}; handlers are: {known}."
                raise HandlerRefused(what, handler.path)
    try:
        order = [*TopologicalSorter({handler.name: handler.after for handler in found}).static_order()]
    except CycleError as error:
        circle = " after ".join(reversed(error.args[1]))
        what = f"{_SETTING}: handlers wait for one another: {circle}."
        raise HandlerRefused(what, *(by_name[name].path for name in error.args[1])) from None
    return [by_name[name] for name in order]


def usable_handlers(paths: Sequence[str]) -> list[HandlerClass]:
    """Those that can be used now. One that cannot (its module was edited, say) is told in the log, and harms neither
    the batches nor the other handlers."""
    while True:
        try:
            return load_handlers(paths)
        except HandlerRefused as error:
            log.error("%s", error)  # noqa: TRY400 (the message says it all)
            paths = [path for path in paths if path not in error.paths]


def make_handler(path: str) -> Any:
    """An object of the class.

    Raises:
        HandlerRefused: no such module or class, or it cannot be made without arguments.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever somebody else's module brings about
        what = f"{_SETTING}: {path!r} (must be module:Class): {type(error).__name__}: {error}"
        raise HandlerRefused(what, path) from None


def _described(path: str) -> HandlerClass:
    handler = make_handler(path)
    for method in _METHODS:
        if not callable(getattr(handler, method, None)):
            raise HandlerRefused(f"{_SETTING}: {path} has no method `{method}`.", path)
    try:
        after = handler.after() if hasattr(handler, "after") else ()
        return HandlerClass(path, str(handler.name()), tuple(map(str, after)))
    except Exception as error:
        what = f"{_SETTING}: {path} does not tell its name: {type(error).__name__}: {error}"
        raise HandlerRefused(what, path) from None
