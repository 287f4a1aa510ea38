"""Published files in an object store: `<prefix>/<key>/<revision>/`, complete where its manifest is.

Objects appear whole or not at all, the manifest is written last, and the files of a revision never change. So what is
there with the right size is not sent again, what a manifest lists is complete, and a folder without one is not.

Through pyarrow's file systems: they speak to both kinds of store without further packages.
"""

import io
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from resources.child import Tell
from resources.errors import ExportFailed
from resources.exports.published import Published, sha256_of
from resources.exports.rows import Written
from resources.exports.targets import ObjectStoreTarget
from resources.redaction import redact

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_ATTEMPTS = 4
_CONNECT_SECONDS = 20
_BLOCK = 1024 * 1024

_abandoned: list[Any] = []
"""Uploads that broke off. pyarrow has no way to give one up: closing a stream makes an object of what was sent, and so
does the garbage collector. Kept open here they end with the process, and the store has no object."""


def export_files(target: ObjectStoreTarget, published: Published, tell: Tell) -> Written:
    """Upload what is not there yet, then the manifest.

    Raises:
        ExportFailed: the store refused, or broke off; no object is partly there.
        FileNotFoundError: the revision went away.
    """
    where = f"{target.scheme}://{target.root}/{published.key}/{published.revision}/"
    try:
        return _export(target, published, tell, where)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            raise  # a file of ours; what is not there of theirs has no such name
        said = str(error).partition(" error_info=")[0]  # Google's library says it all again
        raise ExportFailed(redact(f"{where}: {said}")) from None


def _export(target: ObjectStoreTarget, published: Published, tell: Tell, where: str) -> Written:
    store = _open(target)
    folder = f"{target.root}/{published.key}/{published.revision}"
    files = {str(path.relative_to(published.folder)): path for path in published.files(target.format)}
    manifest = _manifest(published, files, tell)
    there = _sizes(store, folder)
    missing = [entry for entry in manifest["files"] if there.get(entry["name"]) != entry["size"]]
    is_told = MANIFEST in there and _read(store, f"{folder}/{MANIFEST}") == manifest
    if missing or not is_told:
        for number, entry in enumerate(missing, start=1):
            name = entry["name"]
            with files[name].open("rb") as source:
                tell(f"{where}{name}: file {number} of {len(missing)}, {entry['size']:,} bytes")
                _upload(store, f"{folder}/{name}", source, tell)
        there = _sizes(store, folder)
        for entry in manifest["files"]:
            if there.get(entry["name"]) != entry["size"]:
                raise ExportFailed(f"{where}{entry['name']} was sent, and is not there")
        _upload(store, f"{folder}/{MANIFEST}", io.BytesIO(json.dumps(manifest, indent=1).encode()), tell)
    changed = bool(missing) or not is_told
    return Written(where, published.count, _rows_there(store, folder, manifest), changed)


def _upload(store: fs.FileSystem, path: str, source: BinaryIO, tell: Tell) -> None:
    """Make an object of all that the source holds, or none."""
    stream = store.open_output_stream(path)
    done = 0
    try:
        while block := source.read(_BLOCK):
            stream.write(block)
            done += len(block)
            tell(f"{path}: {done:,} bytes sent")
        stream.close()
    except BaseException:
        _abandoned.append(stream)
        raise


def _open(target: ObjectStoreTarget) -> fs.FileSystem:
    found = urlsplit(target.endpoint_url or "")
    scheme, endpoint = found.scheme or None, found.netloc or None
    if target.scheme == "gs":
        anonymous = endpoint is not None and scheme == "http"  # an emulator
        return fs.GcsFileSystem(
            anonymous=anonymous,
            scheme=scheme,
            endpoint_override=endpoint,
            retry_time_limit=timedelta(seconds=target.timeout / 2),  # to say why, before nothing is heard of us
        )
    return fs.S3FileSystem(
        region=target.region,
        scheme=scheme,
        endpoint_override=endpoint,
        connect_timeout=min(_CONNECT_SECONDS, target.timeout),
        request_timeout=target.timeout / 2,
        background_writes=False,  # they would hold in memory all that a slow line has not taken yet
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def _manifest(published: Published, files: dict[str, Path], tell: Tell) -> dict[str, Any]:
    entries = []
    for name, path in files.items():
        entries.append({"name": name, "size": path.stat().st_size, "sha256": sha256_of(path)})
        tell(f"{name}: {entries[-1]['sha256']}")
    return {
        "format_version": FORMAT_VERSION,
        "batch": published.key,
        "revision": published.revision,
        "rows": published.count,
        "files": entries,
    }


def _sizes(store: fs.FileSystem, folder: str) -> dict[str, int]:
    """The objects of a folder and how long they are."""
    found = store.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return {info.path[len(folder) + 1 :]: info.size for info in found if info.type == fs.FileType.File}


def _read(store: fs.FileSystem, path: str) -> Any:
    with store.open_input_stream(path) as stream:
        try:
            return json.loads(stream.read())
        except ValueError:
            return None


def _rows_there(store: fs.FileSystem, folder: str, manifest: dict[str, Any]) -> int:
    """How many rows the store has, asked of it: all files in their size, and what the Parquet files say."""
    sizes = _sizes(store, folder)
    if _read(store, f"{folder}/{MANIFEST}") != manifest:
        return 0
    if any(sizes.get(entry["name"]) != entry["size"] for entry in manifest["files"]):
        return 0
    parts = [entry["name"] for entry in manifest["files"] if entry["name"].endswith(".parquet")]
    if not parts:
        return int(manifest["rows"])
    rows = 0
    for name in parts:
        with store.open_input_file(f"{folder}/{name}") as stream:
            rows += pq.ParquetFile(stream).metadata.num_rows
    return rows
