"""Files that appear whole or not at all, and JSON lines that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from autoslim.errors import RunError


def write_whole(path: Path, content: bytes | str) -> None:
    """Write beside, fsync, rename: whoever looks sees the old file or the new one. Makes the directory."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
        _sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of an indented JSON document."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON and make sure it is on disk."""
    with _writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """A JSON document; `RunError` naming the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: lists in lists without an end
        raise RunError(f"{path} cannot be read: {error}; delete it to compute it again") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; a last line cut short by a kill is dropped, and taken out of the file."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{path}, line {number} is damaged: {error}; delete the file to start its stage again"
            ) from error
        if not isinstance(record, dict):
            raise RunError(
                f"{path}, line {number} is damaged: no JSON object; delete the file to start its stage again"
            )
        records.append(record)
    if lines[-1]:
        keep_records(path, records)
    return records


def keep_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines by these records."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; free some space and run the same command again: what was computed before is kept"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            hint = "; choose another directory with --run-dir"
        raise RunError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def _sync_directory(path: Path) -> None:
    """Make a rename durable, where directories can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
