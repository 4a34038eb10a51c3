"""Files: whole or not at all, and named by their bytes."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradnoise.base.errors import InputError


@contextmanager
def full_disk_named(path: Path | str) -> Iterator[None]:
    """Turn the error of a full disk into an `InputError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(str(path), "cannot be written, no space left", "free some disk space") from error
        raise


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; rename it to `path` when the block ends well.

    A job killed in mid-write leaves `.NAME.partial`, which the next attempt overwrites; `path` itself is
    either the old file, the new one, or absent. Raises `InputError` when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON with sorted keys; NaN and infinities are refused (`ValueError`)."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path | str) -> object:
    """Read a JSON file; raises `InputError` naming it when it is missing or cut short."""
    try:
        value: object = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            str(path), "missing", "rebuild it with snakemake, or fetch it with dvc pull"
        ) from error
    except ValueError as error:
        raise InputError(str(path), "is not whole JSON", "delete it and rebuild it with snakemake") from error
    return value


def canonical_json(value: object) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, no NaN. Hashes are taken over it."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()


def sha256_of(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256(path: Path | str) -> str:
    """SHA-256 (hex) of the bytes of a file."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
