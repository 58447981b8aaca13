"""``edgesight bundle``: one file with all that a board needs, the same bytes each time."""

from __future__ import annotations

import json
import os
import runpy
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgesight import __version__
from edgesight.deploy.bundle import Contents, write_bundle
from edgesight.deploy.bundle_open import open_bundle
from edgesight.deploy.manifest import INSTANCES, PHOTOS, Manifest
from edgesight.models.dataset import open_dataset
from edgesight.models.detector import OnnxDetector
from edgesight.models.errors import InputError, OutputError
from edgesight.models.files import sha256

kit: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_kit.py"))))


def full(tmp_path: Path, tiny_onnx: Any, tiny_coco: Any, tiny_spec: Any) -> list[str | Path]:
    """Words for a bundle with one of everything."""
    data = tiny_coco(tiny_coco.content(6))
    (data / "LICENSE").write_text("CC0\n")
    recipe, report = tmp_path / "small.toml", tmp_path / "report.html"
    recipe.write_text("[quantize]\n")
    report.write_text("<p>fine</p>\n")
    model = tiny_onnx(spec=tiny_spec, name="small.onnx")
    big = tiny_onnx(spec=tiny_spec, name="big.onnx")
    words: list[str | Path] = [model, "--reference", big, "--golden", data, "--golden-limit", "3"]
    return [*words, "--recipe", recipe, "--report", report]


def test_bundle_holds_what_was_named_and_says_so(
    tmp_path: Path,
    tiny_onnx: Any,
    tiny_coco: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.esbundle"
    words = full(tmp_path, tiny_onnx, tiny_coco, tiny_spec)
    assert kit.run([*words, "-o", out, "--json"], monkeypatch) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["bytes"], row["sha256"]) == (out.stat().st_size, sha256(out))
    said = row["manifest"]
    assert (said["name"], said["edgesight"]) == ("small", __version__)
    assert said["spec"]["classes"] == list(tiny_spec.classes)
    assert said["golden"] == {
        "photos": 3, "boxes": 6, "source": "labels", "data": "3 of 6 photos of data",
    }  # fmt: skip
    assert any(text.startswith("onnxruntime") for text in said["requirements"])
    assert [entry["path"] for entry in said["files"]] == [
        f"{PHOTOS}/000001.png", f"{PHOTOS}/000002.png", f"{PHOTOS}/000003.png",
        INSTANCES, "golden/notices/license-1.txt", "model/small.onnx",
        "recipe/small.toml", "reference/big.onnx", "reports/report.html",
    ]  # fmt: skip
    with zipfile.ZipFile(out) as archive:  # any zip tool opens it
        assert archive.testzip() is None
        assert archive.read("reports/report.html") == b"<p>fine</p>\n"
    assert kit.run(["--show", out, "--check-model"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for text in (sha256(out), "model/small.onnx", "3 of 6 photos of data, 6 boxes labelled"):
        assert text in shown


def test_same_inputs_give_the_same_bytes_elsewhere(
    tmp_path: Path,
    tiny_onnx: Any,
    tiny_coco: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = full(tmp_path, tiny_onnx, tiny_coco, tiny_spec)
    first, second = tmp_path / "a" / "x.esbundle", tmp_path / "b" / "y.esbundle"
    assert kit.run([*words, "-o", first], monkeypatch) == 0
    for path in tmp_path.rglob("*"):  # another time and another mode
        if path.is_file():
            os.utime(path, (1e9, 1e9))
            path.chmod(0o600)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o077)
    try:
        near = [w.relative_to(tmp_path) if isinstance(w, Path) else w for w in words]
        assert kit.run([*near, "-o", second], monkeypatch) == 0
    finally:
        os.umask(before)
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_extracting_gives_every_file_and_the_very_same_boxes(
    tmp_path: Path, tiny_onnx: Any, tiny_coco: Any, tiny_spec: Any
) -> None:
    content = tiny_coco.content(5)
    content["annotations"][0]["bbox"] = [0.1, 0.7, 63.3, 47.2]  # no binary fractions
    content["annotations"][1]["bbox"] = [1.0 / 3, 2.0 / 3, 64.5, 48.2]  # over the edge, allowed
    content["licenses"] = [{"id": 3, "name": "CC BY"}]
    content["images"][0] |= {"license": 3, "flickr_url": "http://a.example/1", "date": "today"}
    data = tiny_coco(content)
    path = kit.build(tmp_path, tiny_onnx(spec=tiny_spec), photos=data, limit=3)
    bundle = open_bundle(path)
    folder = bundle.extract(tmp_path / "out" / "it")
    assert Manifest.from_bytes((folder / "manifest.json").read_bytes()) == bundle.manifest
    assert OnnxDetector(folder / bundle.manifest.model).spec == bundle.manifest.spec == tiny_spec
    for entry in bundle.manifest.files:
        assert sha256(folder / entry.path) == entry.sha256
        assert (folder / entry.path).read_bytes() == bundle.read(entry.path)
        assert stat.S_IMODE((folder / entry.path).stat().st_mode) & 0o111 == 0
    golden, wanted = open_dataset(folder / "golden"), open_dataset(data).limit(3)
    assert golden.classes == wanted.classes
    for ours, theirs in zip(golden.photos, wanted.photos, strict=True):
        assert ours.image_id == theirs.image_id
        assert ours.path.read_bytes() == theirs.path.read_bytes()
        np.testing.assert_array_equal(ours.load(), theirs.load())
    for mine, true in zip(golden.labels()[1], wanted.labels()[1], strict=True):
        for column in ("xyxy", "label", "area", "iscrowd"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(true, column))
    said = json.loads(bundle.read(INSTANCES))
    assert said["licenses"] == content["licenses"]
    assert said["images"][0] == {
        "id": 1, "file_name": "000001.png", "original_name": "1.png", "width": 64, "height": 48,
        "license": 3, "flickr_url": "http://a.example/1",
    }  # fmt: skip
    with pytest.raises(OutputError, match="expected a new folder"):
        bundle.extract(folder)


@pytest.mark.parametrize("with_reference", [True, False])
def test_without_labels_a_model_draws_the_boxes(
    tmp_path: Path, tiny_onnx: Any, tiny_coco: Any, tiny_spec: Any, with_reference: bool
) -> None:
    data = tiny_coco() / "images"
    reference = tiny_onnx(spec=tiny_spec, name="big.onnx") if with_reference else None
    path = kit.build(tmp_path, tiny_onnx(spec=tiny_spec), photos=data, reference=reference)
    bundle = open_bundle(path)
    source = "reference" if with_reference else "model"
    assert bundle.manifest.golden is not None
    assert bundle.manifest.golden.source == source
    assert (bundle.manifest.reference is not None) == with_reference
    content = json.loads(bundle.read(INSTANCES))
    assert content["info"] == {"source": source}
    golden = open_dataset(bundle.extract(tmp_path / "out") / "golden")
    found = OnnxDetector(tiny_onnx(spec=tiny_spec))(golden.photos[0].load(), 0.35)
    truth = golden.labels()[1][0]
    assert len(truth) == len(found) == 2
    np.testing.assert_allclose(truth.xyxy, found.xyxy, atol=0.06)
    assert [row["score"] for row in content["annotations"][:2]] == [0.72, 0.5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected one of MODEL, --show and --new-key, found 0"),
        (["m.onnx", "--show", "x"], "found 2"),
        (["m.onnx", "--trust", "k"], "--trust: expected --show with it"),
        (["m.onnx", "--offline"], "--offline: expected --target"),
        (["m.onnx", "--target", "pi-bookworm"], "--target: expected --offline"),
        (["--show", "x", "--sign", "k"], "--sign: expected MODEL"),
        (["m.onnx", "--offline", "--target", "pi-9"], "found 'pi-9'; name the board's"),
        (["absent.onnx"], "absent.onnx"),
        (["m.onnx", "-o", "x.zip"], "expected a name that ends with .esbundle"),
        (["m.onnx", "--report", "a b.json"], "letters, digits and ._+-"),
        (["m.onnx", "--report", "run.py"], "that ends with .csv"),
        (["m.onnx", "--report", "absent.json"], "absent.json: expected a file"),
        (["m.onnx", "--report", "r.json", "--report", "r.json"], "or a second r.json"),
        (["m.onnx", "--golden", "absent"], "absent: expected a folder of photos"),
        (["m.onnx", "--reference", "bad.onnx"], "bad.onnx: expected an ONNX model"),
        (["m.onnx", "--name", "a\nb"], "name: expected 1 to 200 printable characters"),
        (["--show", "m.onnx"], "m.onnx: the file: expected a zip file"),
        (["--show", "absent.esbundle"], "absent.esbundle: expected a bundle"),
        (["--show", "."], "expected a bundle, found: a folder or a device"),
        (["--show", "/dev/null"], "expected a bundle, found: a folder or a device"),
    ],
)
def test_wrong_words_give_one_line_and_no_file(
    words: list[str],
    said: str,
    tmp_path: Path,
    tiny_onnx: Any,
    tiny_spec: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_onnx(spec=tiny_spec, name="m.onnx")
    for name in ("a b.json", "run.py", "r.json", "bad.onnx"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = kit.tree(tmp_path)
    assert kit.run(words, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("edgesight: error: ")
    assert error.count("\n") == 1
    assert said in error
    assert kit.tree(tmp_path) == before


def test_earlier_bundle_stays_when_a_new_one_fails(
    tmp_path: Path, tiny_onnx: Any, tiny_spec: Any
) -> None:
    path = kit.build(tmp_path, tiny_onnx(spec=tiny_spec))
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_bundle(path, Contents(tiny_onnx(), photos=tmp_path / "nothing"))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_onnx: Any, tiny_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(kit.build(tmp_path, tiny_onnx(spec=tiny_spec)))
    before = kit.tree(tmp_path)
    usage = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr("edgesight.deploy.bundle_open.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="of free space, found 1; free some"):
        bundle.extract(tmp_path / "out")
    assert kit.tree(tmp_path) == before


@pytest.mark.shared
def test_shipped_detector_travels_with_real_photos(shared: Path, tmp_path: Path) -> None:
    from edgesight.models.zoo import shipped, shipped_float

    data = shared / "data" / "coco-val"
    path = kit.build(tmp_path, shipped(), reference=shipped_float(), photos=data, limit=8)
    folder = open_bundle(path, check_model=True).extract(tmp_path / "out")
    golden, wanted = open_dataset(folder / "golden"), open_dataset(data).limit(8)
    for mine, true in zip(golden.labels()[1], wanted.labels()[1], strict=True):
        np.testing.assert_array_equal(mine.xyxy, true.xyxy)
        np.testing.assert_array_equal(mine.area, true.area)
