"""Makes bundles, good ones by the command's own way and hostile ones byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from edgesight import __main__ as command_line
from edgesight.deploy.bundle import Contents, write_bundle
from edgesight.deploy.bundle_zip import Entry, tail
from edgesight.deploy.manifest import MANIFEST, SIGNATURE

SUFFIX = ".esbundle"


@dataclass
class Parts:
    """A bundle taken to pieces: its manifest as JSON, and its files."""

    manifest: Any
    files: dict[str, bytes] = field(default_factory=dict)

    def describe(self) -> None:
        """Makes the manifest tell the truth about the files."""
        self.manifest["files"] = [
            {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in sorted(self.files.items())
        ]

    def text(self) -> bytes:
        """The manifest as edgesight spells it."""
        return json.dumps(self.manifest, sort_keys=True, indent=1).encode() + b"\n"

    def pack(self, manifest: bytes | None = None, signature: bytes | None = None) -> bytes:
        """A container with the files, and the manifest as it is or as it is given."""
        rows = [(MANIFEST, self.text() if manifest is None else manifest)]
        if signature is not None:
            rows.append((SIGNATURE, signature))
        return pack([*rows, *sorted(self.files.items())])


def pack(rows: Sequence[tuple[str, bytes]]) -> bytes:
    """A container of any names and contents."""
    out, entries = bytearray(), []
    for name, data in rows:
        entry = Entry(name, len(data), zlib.crc32(data))
        entry = Entry(name, len(data), entry.crc32, len(out) + len(entry.local()))
        entries.append(entry)
        out += entry.local() + data
    return bytes(out + tail(entries, len(out)))


def parts_of(path: Path) -> Parts:
    """Takes a bundle to pieces, with Python's own zip module."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    return Parts(json.loads(content.pop(MANIFEST)), content)


def build(folder: Path, model: Path, *, key: Path | None = None, **more: Any) -> Path:
    """Writes a bundle of a model, with a report, into a folder."""
    report = folder / "report.json"
    report.write_text('{"ap": 21.5}\n')
    target = folder / f"good{SUFFIX}"
    write_bundle(target, Contents(model=model, reports=(report,), **more), key=key)
    return target


def run(words: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs ``edgesight bundle`` as the command line does."""
    entry = (".deploy.bundle_command", "pack a model for its board")
    monkeypatch.setitem(command_line.COMMANDS, "bundle", entry)
    return command_line.main(["bundle", *map(str, words)])


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their content."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def changed(values: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a JSON object with some keys changed."""
    return {**values, **changes}


Forge = Callable[[Parts], bytes]
