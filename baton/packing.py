"""Packing the code of python tasks: the folder of a script as one small, reproducible zip archive.

What travels: every `*.py` file below the script's folder, and the files it names itself (`Graph(files=[...])`). What does
not: hidden folders, `__pycache__`, virtual environments, data nobody named, and packages (name them as requirements). Equal
contents make equal bytes, so the hash finds warm workers again, and large code is sent to the artifact store only once (the
client does that; up to 64 KiB travels with the graph).
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.artifacts import MAX_CODE_PACK_BYTES
from baton.errors import InvalidField

MAX_FOLDER_BYTES = 10 * 1024 * 1024
"""Of what is packed, before it is packed. More is no source code."""

MAX_ENTRIES = 20_000
"""Files and folders looked at. A script in a home folder would otherwise be searched for minutes."""

_SKIPPED = {"__pycache__", "node_modules", "site-packages"}
_STAMP = (1980, 1, 1, 0, 0, 0)
"""Of every entry, so that equal contents are equal bytes."""


@dataclass(frozen=True, slots=True)
class PackedCode:
    """A zip archive and its sha-256 in hex."""

    sha256: str
    zip: bytes


def pack(folder: Path, files: Sequence[str] = ()) -> PackedCode:
    """The python files below `folder` and `files` (names or patterns in it). Raises InvalidField naming the limit."""
    chosen = {path.relative_to(folder).as_posix(): path for path in _sources(folder)}
    for pattern in files:
        try:
            found = [path for path in folder.glob(pattern) if path.is_file()]
        except (NotImplementedError, ValueError) as error:  # an absolute path, an empty one
            raise InvalidField(f"files: {pattern!r} is no pattern below {folder}: {error}") from None
        if ".." in Path(pattern).parts:
            raise InvalidField(f"files: {pattern!r} leaves {folder}: only what is below the script's folder travels")
        if not found:
            raise InvalidField(f"files: {pattern!r} names no file in {folder}")
        chosen.update((path.relative_to(folder).as_posix(), path) for path in found)
    sizes = {name: path.stat().st_size for name, path in chosen.items()}
    if sum(sizes.values()) > MAX_FOLDER_BYTES:
        raise InvalidField(_too_large(folder, sum(sizes.values()), MAX_FOLDER_BYTES, "unpacked", sizes))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(chosen):
            entry = zipfile.ZipInfo(name, _STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, chosen[name].read_bytes())
    packed = out.getvalue()
    if len(packed) > MAX_CODE_PACK_BYTES:
        raise InvalidField(_too_large(folder, len(packed), MAX_CODE_PACK_BYTES, "packed", sizes))
    return PackedCode(hashlib.sha256(packed).hexdigest(), packed)


def _sources(folder: Path) -> Iterator[Path]:
    seen = 0
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _SKIPPED and not Path(here, name, "pyvenv.cfg").exists()
        )
        seen += len(folders) + len(names)
        if seen > MAX_ENTRIES:
            raise InvalidField(f"{folder} holds more than {MAX_ENTRIES} files: move the script to a folder of its own")
        yield from (Path(here, name) for name in names if name.endswith(".py") and not name.startswith("."))


def _too_large(folder: Path, size: int, limit: int, how: str, sizes: dict[str, int]) -> str:
    largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
    return (
        f"the code in {folder} has {size} bytes {how}, over the limit of {limit} (largest: {largest}): move the script to "
        "a folder of its own, or make a package of its modules and name it as a requirement"
    )
