"""Published files in an object store: `<prefix>/<key>/<revision>/`, complete where its manifest is.

Objects appear whole or not at all, the manifest is written last, and the files of a revision never change. So what is
there with the right size is not sent again, and a folder without a manifest is one that nobody should read yet.

Through pyarrow's file systems: no further packages, and fsspec's put over them ends a broken upload by closing it,
which makes an object of the part that was sent. `copy_files` is one call into C++ that no exception of ours can part.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
_SLOWEST_BYTES_A_SECOND = 250_000
"""A file may take as long as this asks for, and the timeout on top of it: an upload tells nothing on its way."""


def export_files(target: ObjectStoreTarget, published: Published, tell: Tell) -> Written:
    """Upload what is not there yet, then the manifest.

    Raises:
        ExportFailed: the store refused, or broke off; no object is partly there.
        FileNotFoundError: the revision went away.
    """
    where = f"{target.scheme}://{target.root}/{published.key}/{published.revision}/"
    try:
        return _export(target, published, tell, where)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ExportFailed(redact(f"{where}: {error}")) from None


def _export(target: ObjectStoreTarget, published: Published, tell: Tell, where: str) -> Written:
    store = _open(target)
    folder = f"{target.root}/{published.key}/{published.revision}"
    files = {str(path.relative_to(published.folder)): path for path in published.files(target.format)}
    manifest = _manifest(published, files, tell)
    there = _sizes(store, folder)
    missing = [entry for entry in manifest["files"] if there.get(entry["name"]) != entry["size"]]
    is_told = MANIFEST in there and _read(store, f"{folder}/{MANIFEST}") == manifest
    if missing or not is_told:
        if MANIFEST in there:
            store.delete_file(f"{folder}/{MANIFEST}")  # not complete until it is written again
        for number, entry in enumerate(missing, start=1):
            name, size = entry["name"], entry["size"]
            message = f"{where}{name}: {size:,} bytes, file {number} of {len(missing)}"
            tell(message, within=target.timeout + size / _SLOWEST_BYTES_A_SECOND)
            fs.copy_files(str(files[name]), f"{folder}/{name}", fs.LocalFileSystem(), store)
        tell(f"{where}{MANIFEST}")
        with store.open_output_stream(f"{folder}/{MANIFEST}") as stream:
            stream.write(json.dumps(manifest, indent=1).encode())
    changed = bool(missing) or not is_told
    return Written(where, published.count, _rows_there(store, folder, manifest), changed)


def _open(target: ObjectStoreTarget) -> fs.FileSystem:
    found = urlsplit(target.endpoint_url or "")
    scheme, endpoint = found.scheme or None, found.netloc or None
    if target.scheme == "gs":
        anonymous = endpoint is not None and scheme == "http"  # an emulator
        return fs.GcsFileSystem(
            anonymous=anonymous,
            scheme=scheme,
            endpoint_override=endpoint,
            retry_time_limit=timedelta(seconds=target.timeout),
        )
    return fs.S3FileSystem(
        region=target.region,
        scheme=scheme,
        endpoint_override=endpoint,
        connect_timeout=min(_CONNECT_SECONDS, target.timeout),
        request_timeout=target.timeout / 2,
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
    """How many rows the store has, asked of it: all files in their size, and the rows that the Parquet files tell of."""
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
