"""The batches under the data root: registration by content, and finding them again."""

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from resources import durable, failpoints
from resources.batch_format.lines import MAX_LINE_BYTES, input_suffix, iter_lines, open_regular
from resources.batch_format.options import load_sidecar, parse_options
from resources.batch_store.batch import Batch, read_spec
from resources.batch_store.spec import BatchSpec, identity_of, is_key, key_of
from resources.errors import BatchLocked, BatchNotFound, CheckpointError, InputRefused
from resources.filesystem import refuse_remote_filesystem
from resources.targets import Targets

log = logging.getLogger(__name__)

_BLOCK = 1024 * 1024
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Registration:
    """A registered batch, and whether this call registered it. `note` says what was not taken over."""

    batch: Batch
    created: bool
    note: str | None = None


class BatchStore:
    """All batches of one data root, each a folder of its own.

    A batch is its content: the same file with the same answer-changing options has the same key wherever it comes
    from, and registering it again changes nothing but its operational options.
    """

    def __init__(self, data_root: Path, targets: Targets | None = None) -> None:
        """`targets` are those that a batch may name when it is registered; none by default."""
        self._targets = targets or Targets()
        self.root = data_root / "batches"
        self.queue_dir = data_root / "queue"
        refuse_remote_filesystem(data_root)
        for folder in (self.root, self.queue_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def register(
        self,
        source: Path,
        options: dict[str, Any] | None = None,
        *,
        engine: Literal["null"] | None = None,
        limit: int | None = None,
        restore: bool = False,
    ) -> Registration:
        """Snapshot a file and give it a key. Options given here stand over those of its sidecar.

        A batch that is published and pruned stays so: there is nothing to ask. `restore` brings its snapshot back.

        Raises:
            InputRefused: no input file, not regular, changed while it was read, or its key is taken by other content.
            OptionsError: an option is unknown or does not fit.
        """
        suffix = input_suffix(source)
        if suffix is None:
            raise InputRefused(f"{source}: a batch file ends in .jsonl, .jsonl.gz or .jsonl.zst.")
        with durable.storage_errors(self.root):
            return self._register(source, suffix, options, engine, limit, restore)

    def _register(
        self,
        source: Path,
        suffix: str,
        options: dict[str, Any] | None,
        engine: Literal["null"] | None,
        limit: int | None,
        restore: bool,
    ) -> Registration:
        given = load_sidecar(source) | (options or {})
        checked = parse_options(given, origin=f"options of {source.name}")
        self._targets.refuse_unknown(checked, origin=f"options of {source.name}")
        self._remove_stale()
        folder = self.root / f"{durable.TEMPORARY}{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        try:
            if limit is not None:
                suffix = ".jsonl"
            name = os.fsencode(source.name).decode("utf-8", "replace")
            copied = _snapshot(source, folder / f"input{suffix}", limit)
            failpoints.reached("written", folder / f"input{suffix}")
            identity = identity_of(copied.sha256, suffix, checked, engine)
            spec = BatchSpec(
                key=key_of(name, input_suffix(source) or "", identity),
                identity=identity,
                source_name=name,
                suffix=suffix,
                sha256=copied.sha256,
                size=copied.size,
                lines=copied.lines if suffix == ".jsonl" else None,
                engine=engine,
                options=checked,
                registered_at=datetime.now(UTC),
            )
            return self._place(folder, spec, restore)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, key: str) -> Batch:
        """The batch of a key.

        Raises:
            BatchNotFound: not a key, or nothing is registered under it; says how to register one.
        """
        if not is_key(key) or not (self.root / key / "batch.json").is_file():
            raise BatchNotFound(
                f"No batch is registered under {key[:100]!r}. Drop its file in the inbox, or register it with "
                "`vllm-batch submit FILE` or the job register_files; the key then follows from its content."
            )
        return Batch(self.root / key, read_spec(self.root / key))

    def keys(self) -> list[str]:
        """Every registered key, in order."""
        return sorted(p.name for p in self.root.iterdir() if is_key(p.name) and (p / "batch.json").is_file())

    def __iter__(self) -> Iterator[Batch]:
        for key in self.keys():
            try:
                yield self.get(key)
            except BatchNotFound:
                continue
            except CheckpointError as error:
                log.warning("%s", error)

    def remove(self, key: str) -> None:
        """Remove a batch with everything in it.

        Raises:
            BatchLocked: a run works on it.
        """
        batch = self.get(key)
        with batch.lock("vllm-batch rm"):
            trash = durable.temporary_beside(batch.root)
            batch.root.rename(trash)
            durable.sync_folder(self.root)
        shutil.rmtree(trash, ignore_errors=True)

    def _place(self, folder: Path, spec: BatchSpec, restore: bool) -> Registration:
        target = self.root / spec.key
        durable.write_file(folder / "batch.json", spec.model_dump_json(indent=1).encode())
        if not target.exists():
            try:
                durable.sync_folder(folder)
                folder.rename(target)
                failpoints.reached("registered", target)
                durable.sync_folder(self.root)
                return Registration(Batch(target, spec), created=True)
            except OSError:
                if not target.exists():
                    raise
        present = self.get(spec.key)
        if present.spec.identity != spec.identity:
            raise InputRefused(
                f"{spec.source_name}: the key {spec.key} is taken by other content ({present.spec.source_name}); "
                "rename the file and register it again."
            )
        restore = present.is_pruned() and (restore or not present.is_published())
        return self._take_over(present, folder, spec, restore)

    def _take_over(self, present: Batch, folder: Path, spec: BatchSpec, restore: bool) -> Registration:
        """Bring a known batch up to date with a new registration: operational options, and a snapshot pruned away."""
        if present.spec.options == spec.options and not restore:
            return Registration(present, created=False)
        updated = present.spec.model_copy(update={"options": spec.options})
        try:
            with present.lock("registration"):
                if restore:
                    (folder / f"input{spec.suffix}").rename(present.input_path)
                if present.final_failure() and present.spec.options != spec.options:
                    (present.root / "run.json").unlink(missing_ok=True)
                durable.write_file(present.root / "batch.json", updated.model_dump_json(indent=1).encode())
        except BatchLocked as locked:
            return Registration(present, created=False, note=f"Its options stay as they were: {locked}")
        return Registration(Batch(present.root, updated), created=False)

    def _remove_stale(self) -> None:
        for path in self.root.glob(f"{durable.TEMPORARY}*"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
            except FileNotFoundError:
                continue


@dataclass(frozen=True)
class _Copied:
    sha256: str
    size: int
    lines: int


def _snapshot(source: Path, target: Path, limit: int | None) -> _Copied:
    with open_regular(source) as stream, target.open("wb") as copy:
        os.chmod(target, 0o600)  # noqa: PTH101 (by the descriptor's path, before content is in it)
        before = os.fstat(stream.fileno())
        pieces = _pieces(stream) if limit is None else _first_lines(stream, input_suffix(source) or ".jsonl", limit)
        digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"
        for piece in pieces:
            copy.write(piece)
            digest.update(piece)
            size += len(piece)
            lines += piece.count(b"\n")
            last = piece[-1:]
        copy.flush()
        os.fsync(copy.fileno())
        after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputRefused(f"{source}: it changed while it was read; register it when it is whole.")
    return _Copied(digest.hexdigest(), size, lines + (last != b"\n"))


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(_BLOCK):
        yield piece


def _first_lines(stream: BinaryIO, suffix: str, limit: int) -> Iterator[bytes]:
    """The first non-blank lines, uncompressed, under their own line numbers. One that is too long stops it."""
    previous = 0
    for taken, (number, line) in enumerate(iter_lines(stream, suffix)):
        if taken == limit:
            return
        if line is None:
            raise InputRefused(f"line {number} is over {MAX_LINE_BYTES} bytes; take a --limit below it.")
        yield b"\n" * (number - previous - 1) + line + b"\n"
        previous = number
