"""Writes bundles: one file with all that a board needs, the same bytes from the same inputs."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__
from ..models.detector import OnnxDetector
from ..models.errors import InputError, OutputError
from ..models.files import atomic_path, is_file
from . import bundle_sign, golden
from .bundle_open import check_onnx, open_bundle
from .bundle_wheels import WheelSet
from .bundle_zip import BLOCK, Entry, tail
from .manifest import (
    FOLDERS,
    MANIFEST,
    PART,
    SIGNATURE,
    SUFFIX,
    FileEntry,
    Manifest,
    check_path,
)
from .own_wheel import base_requirements


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    Attributes:
        model: ONNX file that the board is to run.
        reference: Float model to compare it with; None: none.
        photos: Folder or COCO file of golden photos; None: none.
        limit: Golden photos at most.
        recipe: What the model was made with, TOML; None: not told.
        reports: Of compression or of a gate.
        wheels: For an installation without a network; None: none.
        name: What people call the model; the model file's name without its suffix by default.
    """

    model: Path
    reference: Path | None = None
    photos: Path | None = None
    limit: int = golden.LIMIT
    recipe: Path | None = None
    reports: Sequence[Path] = field(default_factory=tuple)
    wheels: WheelSet | None = None
    name: str = ""


def write_bundle(target: Path, contents: Contents, *, key: Path | None = None) -> Manifest:
    """Writes a bundle, in one step, and opens it again as its receiver will.

    Args:
        target: Its file; the name ends with ``SUFFIX``.
        contents: What goes into it; every model is run once, every photo read.
        key: Private key to sign it with.

    Returns:
        What is in it.

    Raises:
        InputError: Something that is to go into it is missing, too large or no such thing.
        OutputError: The file cannot be written.
    """
    if target.suffix != SUFFIX:
        message = f"{target}: expected a name that ends with {SUFFIX}, found none; add it"
        raise OutputError(message)
    detector = OnnxDetector(contents.model)
    reference = None if contents.reference is None else OnnxDetector(contents.reference)
    if reference is not None and set(reference.spec.classes).isdisjoint(detector.spec.classes):
        message = (
            f"{contents.reference}: expected a reference that knows some of the model's classes, "
            "found none of them; name another --reference"
        )
        raise InputError(message)
    sources = _sources(contents)
    about = None
    if contents.photos is not None:
        drawer, name = (detector, "model") if reference is None else (reference, "reference")
        found = golden.collect(contents.photos, contents.limit, drawer, name)
        about = found.about
        sources |= found.files
    wheels = contents.wheels
    measured = {path: _measure(path, source) for path, source in sorted(sources.items())}
    manifest = Manifest(
        name=contents.name or contents.model.stem,
        edgesight=__version__,
        spec=detector.spec,
        files=tuple(FileEntry(path, size, digest) for path, (size, digest, _) in measured.items()),
        target=wheels.target if wheels else None,
        requirements=wheels.requirements if wheels else base_requirements(),
        golden=about,
    )
    head: dict[str, bytes] = {MANIFEST: manifest.to_bytes()}
    if key is not None:
        head[SIGNATURE] = bundle_sign.sign(head[MANIFEST], key)
    with atomic_path(target) as path:
        _write(path, head, sources, {name: row[2] for name, row in measured.items()}, manifest)
        open_bundle(path).check()  # what the receiver would refuse never gets its name
    return manifest


def _sources(contents: Contents) -> dict[str, Path | bytes]:
    """Returns path in the bundle -> where its bytes are, without the golden photos."""
    found: dict[str, Path | bytes] = {}
    named = [("model", contents.model), ("reference", contents.reference)]
    named += [("recipe", contents.recipe), *(("reports", path) for path in contents.reports)]
    named += [("wheels", path) for path in (contents.wheels.files if contents.wheels else ())]
    for folder, file in named:
        if file is None:
            continue
        path = f"{folder}/{file.name}"
        if not is_file(file):
            message = f"{file}: expected a file for the bundle's {folder}/, found none; check it"
            raise InputError(message)
        rule = FOLDERS[folder]
        size = file.stat().st_size
        if not PART.fullmatch(file.name) or file.suffix not in rule.suffixes:
            message = (
                f"{file}: expected a name of letters, digits and ._+- that ends with "
                f"{' or '.join(rule.suffixes)}, found {file.name!a:.80}; rename it"
            )
            raise InputError(message)
        if size > rule.bytes_max or path.lower() in {name.lower() for name in found}:
            message = (
                f"{file}: expected at most {rule.bytes_max >> 20} MB and a name of its own, found "
                f"{size} bytes or a second {file.name}; choose another file"
            )
            raise InputError(message)
        check_path(path)
        if folder in ("model", "reference"):
            check_onnx(str(file), file.read_bytes())
        found[path] = file
    return found


def _measure(path: str, source: Path | bytes) -> tuple[int, str, int]:
    """Returns size, SHA-256 and CRC-32 of what is to become ``path``."""
    digest, crc32, size = hashlib.sha256(), 0, 0
    for block in _blocks(path, source):
        digest.update(block)
        crc32 = zlib.crc32(block, crc32)
        size += len(block)
    return size, digest.hexdigest(), crc32


def _blocks(path: str, source: Path | bytes) -> Iterator[bytes]:
    """Yields what is to become ``path``, block by block."""
    if isinstance(source, bytes):
        yield source
        return
    try:
        with source.open("rb") as file:
            yield from iter(lambda: file.read(BLOCK), b"")
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{source}: expected a file for the bundle's {path}, found: {reason}; check it"
        raise InputError(message) from error


def _write(
    path: Path,
    head: Mapping[str, bytes],
    sources: Mapping[str, Path | bytes],
    checksums: Mapping[str, int],
    manifest: Manifest,
) -> None:
    rows: list[tuple[str, int, int, Path | bytes]] = [
        (name, len(data), zlib.crc32(data), data) for name, data in head.items()
    ]
    rows += [(e.path, e.size, checksums[e.path], sources[e.path]) for e in manifest.files]
    entries = []
    with path.open("wb") as out:
        for name, size, crc32, source in rows:
            start = out.tell() + len(Entry(name, size, crc32).local())
            entry = Entry(name, size, crc32, start)
            entries.append(entry)
            out.write(entry.local())
            for block in _blocks(name, source):
                out.write(block)
            if out.tell() != start + size:
                message = f"{source!s:.200}: expected {size} bytes as before, found others; again"
                raise InputError(message)
        out.write(tail(entries, out.tell()))
