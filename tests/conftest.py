"""Fixtures that several test files use."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from edgesight.models.spec import METADATA_KEY, ModelSpec
from onnx import helper, numpy_helper

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("EDGESIGHT_SHARED", ROOT.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs the development photos where they are not there."""
    if SHARED.is_dir():
        return
    mark = pytest.mark.skip(reason=f"no development photos and weights at {SHARED}")
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(mark)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development photos and weights."""
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this session: nothing that was made before counts, or is touched."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("EDGESIGHT_CACHE")
    os.environ["EDGESIGHT_CACHE"] = str(folder)
    yield folder
    os.environ.pop("EDGESIGHT_CACHE")
    if before is not None:
        os.environ["EDGESIGHT_CACHE"] = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, small ones faster; no flushing of tiny numbers is left for other tests."""
    import torch  # not there where the board's part alone is tested

    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    torch.set_flush_denormal(False)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """After the test no thread of the loop may be left."""
    yield
    until = time.monotonic() + 5
    while True:
        ours = [t.name for t in threading.enumerate() if t.name.startswith("edgesight-")]
        if not ours:
            return
        assert time.monotonic() < until, ours
        time.sleep(0.01)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Photos of blobs, so that neighbouring pixels have something in common."""
    rng = np.random.default_rng(1)
    paths = []
    for i in range(12):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        cv2.imwrite(str(path), cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC))
        paths.append(path)
    return paths


CELLS = 4 * 4 + 2 * 2 + 1  # of a 32x32 input at strides 8, 16, 32
TINY_CLASSES = ("person", "cat", "motorcycle")


@dataclass(frozen=True)
class TinyOnnx:
    """Builds small detectors for a 32x32 input that say the same of every picture.

    Their weights are a table of raw outputs; the input only enters multiplied by zero.
    """

    folder: Path

    def __call__(
        self,
        outputs: Mapping[str, npt.NDArray[np.float32]] | None = None,
        *,
        name: str = "tiny.onnx",
        spec: ModelSpec | None = None,
        uint8: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes a model; by default of YOLOX's layout, with the boxes of ``yolox_rows``."""
        raw = {"output": yolox_rows()} if outputs is None else outputs
        stored = dict(metadata or {})
        if spec is not None:
            stored[METADATA_KEY] = spec.to_json()
        shape, kind = ([1, 3, 32, 32], onnx.TensorProto.FLOAT)
        nodes = []
        source = "images"
        if uint8:
            shape, kind = ([1, 32, 32, 3], onnx.TensorProto.UINT8)
            nodes.append(helper.make_node("Cast", ["images"], ["cast"], to=1))
            source = "cast"
        nodes += [
            helper.make_node("ReduceMean", [source], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        ]
        nodes += [helper.make_node("Add", [f"{key}_table", "nothing"], [key]) for key in raw]
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("images", kind, shape)],
            [helper.make_tensor_value_info(key, 1, value.shape) for key, value in raw.items()],
            [
                numpy_helper.from_array(np.zeros((), np.float32), "zero"),
                *(
                    numpy_helper.from_array(value.astype(np.float32), f"{key}_table")
                    for key, value in raw.items()
                ),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
        model.ir_version = 8
        helper.set_model_props(model, stored)
        path = self.folder / name
        onnx.save(model, path)
        return path


def yolox_rows() -> npt.NDArray[np.float32]:
    """Returns raw YOLOX outputs ``(1, 21, 8)``: a person and a motorcycle, nothing else.

    In 32x32 input pixels: person at (4, 8, 20, 24), score 0.9 * 0.8; motorcycle at
    (16, 16, 32, 32), score 0.5.
    """
    rows = np.zeros((1, CELLS, 5 + len(TINY_CLASSES)), np.float32)
    rows[0, 5] = [0.5, 1.0, np.log(2), np.log(2), 0.9, 0.8, 0.0, 0.0]  # stride 8, column 1, row 1
    rows[0, 19] = [0.5, 0.5, 0, 0, 1.0, 0.0, 0.0, 0.5]  # stride 16, column 1, row 1
    return rows


@pytest.fixture
def tiny_onnx(tmp_path: Path) -> TinyOnnx:
    """Builds small ONNX detectors in the test's folder."""
    return TinyOnnx(tmp_path)


@pytest.fixture
def tiny_spec() -> ModelSpec:
    """The spec of what ``tiny_onnx`` builds by default."""
    return ModelSpec("yolox", (32, 32), TINY_CLASSES, name="tiny")


@dataclass(frozen=True)
class TinyCoco:
    """Writes small COCO folders of noise photos."""

    folder: Path

    def content(self, photos: int = 2, wh: tuple[int, int] = (64, 48)) -> dict[str, Any]:
        """Returns a correct COCO file: per photo a person and a motorbike."""
        images, annotations = [], []
        for i in range(1, photos + 1):
            images.append({"id": i, "file_name": f"{i}.png", "width": wh[0], "height": wh[1]})
            for k, (category, box) in enumerate(((1, [8, 16, 32, 32]), (4, [32, 32, 32, 16]))):
                annotations.append(
                    {"id": 2 * i + k, "image_id": i, "category_id": category, "bbox": box}
                )
        categories = [{"id": 1, "name": "person"}, {"id": 4, "name": "motorbike"}]
        return {"images": images, "annotations": annotations, "categories": categories}

    def __call__(self, content: Any = None, *, name: str = "data") -> Path:
        """Writes ``instances.json`` and the photos it names; returns the folder."""
        content = self.content() if content is None else content
        folder = self.folder / name
        (folder / "images").mkdir(parents=True)
        random = np.random.default_rng(0)
        for image in content["images"] if isinstance(content, dict) else ():
            target = folder / "images" / str(image.get("file_name"))
            if target.resolve().is_relative_to(folder.resolve()):
                size = (int(image.get("height") or 1), int(image.get("width") or 1), 3)
                cv2.imwrite(str(target), random.integers(0, 256, size, dtype=np.uint8))
        (folder / "instances.json").write_text(json.dumps(content))
        return folder


@pytest.fixture
def tiny_coco(tmp_path: Path) -> TinyCoco:
    """Writes small COCO folders in the test's folder."""
    return TinyCoco(tmp_path)
