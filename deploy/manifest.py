"""What a bundle says about itself: its files with their hashes, the model's spec, the target.

The manifest is the one file of a bundle that is believed, and only after every field was checked;
everything else in the bundle is compared with it. It holds no time, host, user or path of the
machine that made it, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, NoReturn

from ..models.errors import InputError, ModelFileError
from ..models.spec import ModelSpec

FORMAT, VERSION = "edgesight.bundle", 1
SUFFIX = ".esbundle"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MANIFEST_MAX = 2 << 20
FILES_MAX = 2_000
TOTAL_MAX = 2 << 30
"""Bytes of a whole bundle; a plain zip file ends at 4 GB."""
PATH_MAX, PART = 200, re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
INSTANCES = "golden/instances.json"
PHOTOS = "golden/images"
SOURCES = ("labels", "reference", "model")
"""Who drew the golden boxes: people, the float reference, or the bundled model itself."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
"""What Windows takes for a device."""


@dataclass(frozen=True)
class Folder:
    """What may lie in one folder of a bundle.

    Attributes:
        suffixes: Endings of its files' names.
        bytes_max: Of one file.
        count_max: Of files.
    """

    suffixes: tuple[str, ...]
    bytes_max: int
    count_max: int


FOLDERS: dict[str, Folder] = {
    "model": Folder((".onnx",), 256 << 20, 1),
    "reference": Folder((".onnx",), 512 << 20, 1),
    "golden": Folder((".json",), 32 << 20, 1),
    PHOTOS: Folder((".bmp", ".jpeg", ".jpg", ".png", ".webp"), 16 << 20, 1_000),
    "golden/notices": Folder((".md", ".txt"), 1 << 20, 8),
    "recipe": Folder((".toml",), 1 << 20, 1),
    "reports": Folder((".csv", ".html", ".json", ".md", ".txt", ".xml"), 32 << 20, 32),
    "wheels": Folder((".whl",), 512 << 20, 100),
}


def refuse(what: str, expected: str, found: str) -> NoReturn:
    """Refuses a bundle that is not what it must be.

    Raises:
        InputError: Always.
    """
    message = (
        f"bundle: {what}: expected {expected}, found {found}; "
        "copy the bundle again, or make it anew with edgesight bundle"
    )
    raise InputError(message)


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle.

    Attributes:
        path: Within the bundle, with slashes.
        size: Its length in bytes.
        sha256: 64 hex digits.
    """

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            InputError: A path that leads elsewhere or is not allowed, a size or hash that is none.
        """
        check_path(self.path)
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256 if isinstance(self.sha256, str) else ""):
            refuse(f"SHA-256 of {self.path}", "64 hex digits", f"{self.sha256!a:.80}")
        most = FOLDERS[self.path.rpartition("/")[0]].bytes_max
        if type(self.size) is not int or not 0 <= self.size <= most:
            refuse(f"size of {self.path}", f"0 to {most} bytes", f"{self.size!a:.80}")


def check_path(path: Any) -> None:
    """Refuses a file name that may not be in a bundle.

    Raises:
        InputError: It leads elsewhere, is over-long, has odd characters, or is of another kind
            than its folder takes; code and pickles have no folder.
    """
    if not isinstance(path, str) or not 0 < len(path) <= PATH_MAX:
        refuse("a file's name", f"a text of at most {PATH_MAX} characters", f"{path!a:.80}")
    parts = path.split("/")
    odd = [
        part
        for part in parts
        if not PART.fullmatch(part) or part.endswith(".") or RESERVED.fullmatch(part.split(".")[0])
    ]
    if odd:
        refuse(
            "a file's name", "letters, digits and ._+- below the bundle's folders", f"{path!a:.80}"
        )
    place = FOLDERS.get(path.rpartition("/")[0])
    if place is None or PurePosixPath(path).suffix not in place.suffixes:
        kinds = "; ".join(f"{name}/*{{{','.join(f.suffixes)}}}" for name, f in FOLDERS.items())
        refuse("a file", f"one of {kinds}", f"{path!a:.80}")


@dataclass(frozen=True)
class Target:
    """A board's kind, as far as wheels go.

    Attributes:
        name: Preset, or ``machine/pyXY``.
        machine: As ``platform.machine()`` says, ``aarch64`` or ``x86_64``.
        python: Major and minor version, as ``3.11``.
        glibc: The oldest minor version of glibc 2 that it may have.
    """

    name: str
    machine: str
    python: str
    glibc: int

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            InputError: A field has the wrong type or an impossible value.
        """
        for key, form in (
            ("name", r"[a-z0-9][a-z0-9_/.-]{0,39}"),
            ("machine", r"aarch64|x86_64"),
            ("python", r"3\.\d\d?"),
        ):
            value = getattr(self, key)
            if not isinstance(value, str) or not re.fullmatch(form, value):
                refuse(f"target: {key}", form, f"{value!a:.80}")
        if type(self.glibc) is not int or not 17 <= self.glibc <= 99:
            refuse("target: glibc", "17 to 99", f"{self.glibc!a:.80}")


@dataclass(frozen=True)
class Golden:
    """What the golden photos are.

    Attributes:
        photos: How many.
        boxes: How many on all of them.
        source: One of ``SOURCES``: who drew the boxes.
        data: Name of the data set, and of how many photos they are a selection.
    """

    photos: int
    boxes: int
    source: str
    data: str

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            InputError: A field has the wrong type or an impossible value.
        """
        for key in ("photos", "boxes"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 0:
                refuse(f"golden: {key}", "a number >= 0", f"{getattr(self, key)!a:.80}")
        if self.source not in SOURCES:
            refuse("golden: source", f"one of {', '.join(SOURCES)}", f"{self.source!a:.80}")
        _check_text("golden: data", self.data)


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        name: What people call the model; by default its file's name without its suffix.
        edgesight: Version that made the bundle.
        spec: The model's, as its ONNX file says it, repeated for reading.
        files: All files but the manifest and its signature, by path.
        target: The board that ``wheels/`` is for; None without wheels.
        requirements: What edgesight needs: exact versions with wheels, ranges without.
        golden: What the golden photos are; None without any.
    """

    name: str
    edgesight: str
    spec: ModelSpec
    files: tuple[FileEntry, ...]
    target: Target | None = None
    requirements: tuple[str, ...] = ()
    golden: Golden | None = None
    _by_path: dict[str, FileEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks what the parts alone cannot.

        Raises:
            InputError: Files are missing, doubled, too many, or do not fit what is said of them.
        """
        _check_text("name", self.name)
        _check_text("edgesight", self.edgesight)
        if len(self.requirements) > 200:
            refuse("requirements", "at most 200", str(len(self.requirements)))
        for text in self.requirements:
            _check_text("requirements", text)
        paths = [entry.path for entry in self.files]
        if len({path.lower() for path in paths}) != len(paths) or paths != sorted(paths):
            refuse("files", "each once (also on a disk that ignores case), sorted", "others")
        if len(paths) > FILES_MAX:
            refuse("files", f"at most {FILES_MAX}", str(len(paths)))
        total = sum(entry.size for entry in self.files)
        if total > TOTAL_MAX:
            refuse("files", f"at most {TOTAL_MAX} bytes in all", str(total))
        object.__setattr__(self, "_by_path", {entry.path: entry for entry in self.files})
        for folder, rule in FOLDERS.items():
            if (count := len(self.within(folder))) > rule.count_max:
                refuse(f"{folder}/", f"at most {rule.count_max} files", str(count))
        self._check_together()

    def _check_together(self) -> None:
        if not self.within("model"):
            refuse("model/", "one ONNX file", "none")
        if bool(self.within("wheels")) != (self.target is not None):
            refuse("target", "one if there are wheels, and only then", f"{self.target}")
        photos, boxes = len(self.within(PHOTOS)), len(self.within("golden"))
        said = self.golden.photos if self.golden else 0
        if photos != said or boxes != (self.golden is not None):
            refuse("golden/", f"{said} photos and their {INSTANCES}", f"{photos} and {boxes}")

    def within(self, folder: str) -> tuple[FileEntry, ...]:
        """Returns the files that lie directly in one of ``FOLDERS``."""
        return tuple(e for e in self.files if e.path.rpartition("/")[0] == folder)

    def entry(self, path: str) -> FileEntry:
        """Returns one file.

        Raises:
            InputError: There is none of that name.
        """
        if path not in self._by_path:
            refuse("a file", "one that the manifest lists", f"{path!a:.80}")
        return self._by_path[path]

    @property
    def model(self) -> str:
        """Path of the model within the bundle."""
        return self.within("model")[0].path

    @property
    def reference(self) -> str | None:
        """Path of the reference model within the bundle; None without one."""
        found = self.within("reference")
        return found[0].path if found else None

    @property
    def total_bytes(self) -> int:
        """Of all files together."""
        return sum(entry.size for entry in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values |= {"format": FORMAT, "version": VERSION, "spec": asdict(self.spec)}
        values["files"] = [asdict(entry) for entry in self.files]
        for key in ("target", "golden"):
            values[key] = asdict(values[key]) if values[key] else None
        return values

    def to_bytes(self) -> bytes:
        """Returns the text of ``manifest.json``: always the same for the same values."""
        text = json.dumps(self.to_dict(), sort_keys=True, indent=1, allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads a manifest of which nothing is believed.

        Raises:
            InputError: It is too large, no JSON of this form and version, or says the impossible.
        """
        values = _object("manifest", _read_json(data), cls, {"format", "version"})
        if values["format"] != FORMAT:
            refuse("format", FORMAT, f"{values['format']!a:.80}")
        if type(values["version"]) is not int or values["version"] != VERSION:
            message = (
                f"bundle: version: expected {VERSION}, found {values['version']!a:.80}; the bundle "
                "is from another edgesight: pip install -U edgesight, or make it anew"
            )
            raise InputError(message)
        for key in ("files", "requirements"):
            if not isinstance(values[key], list):
                refuse(key, "a list", type(values[key]).__name__)
        if len(values["files"]) > FILES_MAX:
            refuse("files", f"at most {FILES_MAX}", str(len(values["files"])))
        parts: dict[str, Any] = {key: values[key] for key in ("name", "edgesight")}
        for key, kind in (("target", Target), ("golden", Golden)):
            value = values[key]
            parts[key] = None if value is None else kind(**_object(key, value, kind))
        return cls(
            **parts,
            spec=_read_spec(values["spec"]),
            files=tuple(FileEntry(**_object("files", v, FileEntry)) for v in values["files"]),
            requirements=tuple(values["requirements"]),
        )


def _read_spec(value: Any) -> ModelSpec:
    if not isinstance(value, dict):
        refuse("spec", "an object", type(value).__name__)
    try:
        return ModelSpec.from_json(json.dumps(value))
    except ModelFileError as error:
        message = f"bundle: {error}"
        raise InputError(message) from error


def _object(
    what: str, value: Any, kind: type, more: frozenset[str] | set[str] = frozenset()
) -> Any:
    """Returns a JSON object if it has exactly the keys of a data class, and ``more``."""
    wanted = {f.name for f in fields(kind) if f.init} | more
    if not isinstance(value, dict) or value.keys() != wanted:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        refuse(what, f"the keys {', '.join(sorted(wanted))}", f"{found!a:.120}")
    return value


def _read_json(data: bytes) -> Any:
    if len(data) > MANIFEST_MAX:
        refuse(MANIFEST, f"at most {MANIFEST_MAX} bytes", str(len(data)))
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_once_each,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError) as error:
        refuse(MANIFEST, "JSON", f"{error!s:.80}")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        message = "a key twice"
        raise ValueError(message)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        message = f"a number that is not finite, {text:.20}"
        raise ValueError(message)
    return value


def _check_text(what: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        refuse(what, "1 to 200 printable characters", f"{value!a:.80}")
