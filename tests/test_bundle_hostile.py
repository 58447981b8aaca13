"""Hostile and damaged bundles: each is refused in one line, and nothing is written."""

from __future__ import annotations

import io
import random
import runpy
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edgesight.deploy.bundle_open import open_bundle
from edgesight.deploy.bundle_zip import CENTRAL, END
from edgesight.deploy.manifest import FILES_MAX, MANIFEST_MAX
from edgesight.models.errors import InputError, ModelFileError

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_kit.py"))))
REPORT = "reports/report.json"
Change = Callable[[Any], bytes]


def named(name: str) -> Change:
    """A file of that name, listed as it must be."""

    def change(parts: Any) -> bytes:
        parts.files[name] = b"boo"
        parts.describe()
        return bytes(parts.pack())

    return change


def told(**changes: Any) -> Change:
    """A manifest that says something else."""

    def change(parts: Any) -> bytes:
        parts.manifest |= changes
        return bytes(parts.pack())

    return change


def spelled(text: Callable[[Any], bytes]) -> Change:
    """A manifest of other bytes."""
    return lambda parts: bytes(parts.pack(text(parts)))


def record(field: int, value: int, which: int = 1) -> Change:
    """One number of a file's directory record changed; ``field`` as ``CENTRAL`` counts."""

    def change(parts: Any) -> bytes:
        data = bytearray(parts.pack())
        at = END.unpack_from(data, len(data) - END.size)[6]
        for _ in range(which):
            at += CENTRAL.size + CENTRAL.unpack_from(data, at)[10]
        values = list(CENTRAL.unpack_from(data, at))
        values[field] = value
        CENTRAL.pack_into(data, at, *values)
        return bytes(data)

    return change


def ordinary_zip(method: int) -> Change:
    """The same files as a common zip tool packs them."""

    def change(parts: Any) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            archive.writestr("manifest.json", parts.text())
            for name, data in sorted(parts.files.items()):
                archive.writestr(name, data)
        return out.getvalue()

    return change


def entry_changed(**changes: Any) -> Change:
    def change(parts: Any) -> bytes:
        parts.manifest["files"][0] |= changes
        return bytes(parts.pack())

    return change


def replaced(name: str, data: bytes, describe: bool) -> Change:
    def change(parts: Any) -> bytes:
        parts.files[name] = data
        if describe:
            parts.describe()
        return bytes(parts.pack())

    return change


def doubled(parts: Any) -> bytes:
    rows = [("manifest.json", parts.text()), *sorted(parts.files.items())]
    return bytes(kit.pack([*rows, rows[-1]]))


def other_checksum(parts: Any) -> bytes:
    """Both headers of a file give one that is not its own."""
    data, right = parts.pack(), zlib.crc32(parts.files[REPORT]).to_bytes(4, "little")
    assert data.count(right) == 2
    return bytes(data.replace(right, b"\0\1\2\3"))


def two_cases(parts: Any) -> bytes:
    parts.files[REPORT.replace("report.json", "Report.json")] = b"{}"
    parts.describe()
    return bytes(parts.pack())


def gap(parts: Any) -> bytes:
    good = parts.pack()
    at = END.unpack_from(good, len(good) - END.size)[6]
    end = bytearray(good[-END.size :])
    values = list(END.unpack(end))
    values[6] += 9
    END.pack_into(end, 0, *values)
    return good[:at] + b"smuggled!" + good[at : -END.size] + bytes(end)


def many(parts: Any) -> bytes:
    rows = [(f"reports/{i}.json", b"") for i in range(FILES_MAX + 3)]
    return bytes(kit.pack([("manifest.json", parts.text()), *rows]))


def unsorted(parts: Any) -> bytes:
    rows = [("manifest.json", parts.text()), *sorted(parts.files.items(), reverse=True)]
    return bytes(kit.pack(rows))


def without(name: str, describe: bool) -> Change:
    def change(parts: Any) -> bytes:
        del parts.files[name]
        if describe:
            parts.describe()
        return bytes(parts.pack())

    return change


HUGE = {"path": "wheels/x.whl", "size": 512 << 20, "sha256": "0" * 64}
DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE: dict[str, tuple[Change, str]] = {
    "leads upwards": (named("../evil.json"), "a file's name"),
    "leads upwards later": (named("reports/../../evil.json"), "a file's name"),
    "absolute": (named("/tmp/evil.json"), "a file's name"),
    "backslash": (named("reports\\..\\evil.json"), "a file's name"),
    "drive": (named("C:/evil.json"), "a file's name"),
    "zero byte": (named("reports/a\0.json"), "a file's name"),
    "line end": (named("reports/a\n.json"), "a file's name"),
    "escape": (named("reports/\x1b[2J.json"), "a file's name"),
    "over-long": (named(f"reports/{'a' * 300}.json"), "a file's name"),
    "hidden": (named("reports/.profile.json"), "a file's name"),
    "empty part": (named("reports//evil.json"), "a file's name"),
    "device of Windows": (named("reports/con.json"), "a file's name"),
    "pickle": (named("model/net.pkl"), "a file: expected one of model/"),
    "torch file": (named("reference/net.pth"), "a file: expected one of model/"),
    "code": (named("recipe/setup.py"), "a file: expected one of model/"),
    "path file": (named("wheels/evil.pth"), "a file: expected one of model/"),
    "other folder": (named("etc/evil.json"), "a file: expected one of model/"),
    "folder's own": (named("golden/evil/x.json"), "a file: expected one of model/"),
    "second model": (named("model/other.onnx"), "model/: expected at most 1"),
    "two of one name by case": (two_cases, "each name once"),
    "twice": (doubled, "each name once"),
    "link": (record(15, 0o120777 << 16), "a link, folder or special file"),
    "folder": (record(15, 0o040755 << 16), "a link, folder or special file"),
    "set-user-id": (record(15, 0o104755 << 16), "a link, folder or special file"),
    "encrypted": (record(3, 1), "an encrypted one"),
    "said to be deflated": (record(4, 8), "a compressed one"),
    "deflated": (ordinary_zip(zipfile.ZIP_DEFLATED), "a compressed one"),
    "bomb": (record(9, 0xFFFFFFF0), "a compressed one"),
    "both sizes lie": (record(8, 4, which=2), "a compressed one"),
    "other tool": (ordinary_zip(zipfile.ZIP_STORED), "a link, folder or special file"),
    "overlapping": (record(16, 0, which=2), "its header right after the file before it"),
    "other time": (record(6, 0x5A21), "a record as edgesight writes it"),
    "extra field": (record(11, 4), "a record as edgesight writes it"),
    "gap": (gap, "right after the last file"),
    "more than the end": (lambda parts: parts.pack() + b"PK", "an end record as its last bytes"),
    "second end record": (
        lambda parts: parts.pack() + parts.pack()[-END.size :],
        "one that fits the file",
    ),
    "bundle after a bundle": (lambda parts: parts.pack() * 2, "one that fits the file"),
    "something before it": (lambda parts: b"#!/bin/sh\n" + parts.pack(), "expected a zip file"),
    "too many": (many, "expected 1 to 2002 files"),
    "cut": (lambda parts: parts.pack()[:-300], "an end record as its last bytes"),
    "cut to the start": (lambda parts: parts.pack()[:10], "an end record as its last bytes"),
    "empty": (lambda parts: b"", "expected a zip file"),
    "no zip": (lambda parts: b"\x7fELF" + b"\0" * 400, "expected a zip file"),
    "not listed": (replaced("reports/more.json", b"{}", False), "reports/more.json"),
    "missing": (without(REPORT, False), "those of the manifest"),
    "no model": (without("model/tiny.onnx", True), "model/: expected one ONNX file"),
    "other order": (unsorted, "another order"),
    "other size": (replaced(REPORT, b"{}", False), "expected 13 bytes, found 2"),
    "other content": (replaced(REPORT, b'{"ap": 99.5}\n', False), "SHA-256"),
    "other checksum": (other_checksum, "the checksum of its header"),
    "no ONNX": (replaced("model/tiny.onnx", b"\x80\x04K\x01.", True), "expected an ONNX model"),
    "no manifest": (lambda parts: kit.pack(sorted(parts.files.items())), "the first file"),
    "huge manifest": (spelled(lambda _: b" " * (MANIFEST_MAX + 1)), "the first file"),
    "deep manifest": (spelled(lambda _: DEEP), "manifest.json: expected JSON"),
    "no JSON": (spelled(lambda _: b"\xff\xfe{"), "manifest.json: expected JSON"),
    "key twice": (spelled(lambda _: b'{"a": 1, "a": 2}'), "a key twice"),
    "NaN": (told(version=float("nan")), "not finite, NaN"),
    "infinite": (
        spelled(lambda p: p.text().replace(b'"version": 1', b'"version": 1e999')),
        "not finite, 1e999",
    ),
    "other spelling": (spelled(lambda p: p.text() + b" "), "another spelling"),
    "unknown version": (told(version=2), "version: expected 1, found 2"),
    "version of another type": (told(version=True), "version: expected 1, found True"),
    "other format": (told(format="tar"), "format: expected edgesight.bundle"),
    "unknown key": (told(run="rm"), "manifest: expected the keys"),
    "list": (spelled(lambda _: b"[]"), "found 'list'"),
    "files no list": (told(files={}), "files: expected a list"),
    "file no object": (told(files=[1]), "files: expected the keys"),
    "name no text": (entry_changed(path=7), "a file's name: expected a text"),
    "negative size": (entry_changed(size=-1), "size of model/tiny.onnx"),
    "size of another type": (entry_changed(size=True), "size of model/tiny.onnx"),
    "fraction as size": (entry_changed(size=1.5), "size of model/tiny.onnx"),
    "file too large": (entry_changed(size=1 << 40), "size of model/tiny.onnx"),
    "hash that is none": (entry_changed(sha256=["0"]), "SHA-256 of model/tiny.onnx"),
    "too much in all": (
        told(files=[HUGE | {"path": f"wheels/x{i}.whl"} for i in range(5)]),
        "bytes in all",
    ),
    "spec without classes": (told(spec={"head": "yolox"}), "model spec: expected head"),
    "spec of another type": (told(spec=[]), "spec: expected an object"),
    "name with an escape": (told(name="\x1b[2J"), "name: expected 1 to 200 printable"),
    "golden without photos": (
        told(golden={"photos": 3, "boxes": 1, "source": "labels", "data": "x"}),
        "golden/: expected 3 photos",
    ),
    "target without wheels": (
        told(target={"name": "pi", "machine": "aarch64", "python": "3.11", "glibc": 36}),
        "target: expected one if there are wheels",
    ),
    "target of another type": (
        told(target={"name": 1, "machine": "aarch64", "python": "3.11", "glibc": 36}),
        "target: name",
    ),
    "requirement of another type": (told(requirements=[["x"]]), "requirements: expected 1 to 200"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle of a tiny model."""
    folder = tmp_path_factory.mktemp("good")
    app: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("app_kit.py"))))
    made: Path = kit.build(folder, app.build_tiny(folder / "tiny.onnx"))
    return made


def test_what_the_forger_packs_unchanged_is_a_good_bundle(good: Path, tmp_path: Path) -> None:
    assert kit.parts_of(good).pack() == good.read_bytes()
    open_bundle(good).extract(tmp_path / "out")
    assert len(HOSTILE) >= 14


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_bundle_is_refused_in_one_line_and_writes_nothing(
    kind: str,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, said = HOSTILE[kind]
    place = tmp_path / "here"
    place.mkdir()
    path = place / "it.esbundle"
    path.write_bytes(change(kit.parts_of(good)))
    before = kit.tree(tmp_path)
    with pytest.raises(InputError) as caught:
        open_bundle(path).extract(place / "out")
    assert said in str(caught.value)
    assert kit.run(["--show", path], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("edgesight: error: ")
    assert said in error
    assert error.isascii()
    assert error.rstrip("\n").isprintable(), "one line, and no escape sequences"
    assert "; " in error, "what to do"
    assert kit.tree(tmp_path) == before
    assert not (place / "out").exists()


def test_any_damaged_byte_is_noticed(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "it.esbundle"
    where = random.Random(0).sample(range(len(data)), 300)
    where += range(40)
    where += range(len(data) - 150, len(data))
    for at in where:
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            open_bundle(path).check()


def test_any_cut_is_noticed(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "it.esbundle"
    for length in (*range(0, len(data), 97), *range(len(data) - 60, len(data))):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_bundle(path)


def test_file_that_changes_while_it_is_open_is_noticed(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "it.esbundle"
    path.write_bytes(good.read_bytes())
    bundle = open_bundle(path)
    place = bundle._places[REPORT].start
    path.write_bytes(good.read_bytes()[:place] + b"X" + good.read_bytes()[place + 1 :])
    with pytest.raises(InputError, match="SHA-256"):
        bundle.read(REPORT)
    path.write_bytes(good.read_bytes()[: place + 4])
    with pytest.raises(InputError, match="an end after 4"):
        bundle.extract(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["it.esbundle"]


def test_model_that_does_not_run_is_refused_when_asked(good: Path, tmp_path: Path) -> None:
    parts = kit.parts_of(good)
    # No graph, but a version and a producer: only a trial run tells it from a model.
    parts.files["model/tiny.onnx"] = b"\x08\x08\x12\x04evil"
    parts.describe()
    path = tmp_path / "it.esbundle"
    path.write_bytes(parts.pack())
    open_bundle(path).check()
    with pytest.raises(ModelFileError, match=r"it\.esbundle: model/tiny\.onnx: expected"):
        open_bundle(path, check_model=True)
    assert [p.name for p in tmp_path.iterdir()] == ["it.esbundle"]


def test_weights_in_other_files_are_refused(good: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load_model_from_string(kit.parts_of(good).files["model/tiny.onnx"])
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    parts = kit.parts_of(good)
    parts.files["model/tiny.onnx"] = model.SerializeToString()
    parts.describe()
    path = tmp_path / "it.esbundle"
    path.write_bytes(parts.pack())
    with pytest.raises(ModelFileError, match="found weights in others"):
        open_bundle(path).extract(tmp_path / "out")
