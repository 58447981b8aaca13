"""The networks against the published files, on real photos."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from edgesight.models.errors import ModelFileError
from edgesight.models.nets.build import build_net, load_weights

pytestmark = pytest.mark.shared

SIDE = 416
MEAN = np.array([103.53, 116.28, 123.675], np.float32)
STD = np.array([57.375, 57.12, 58.395], np.float32)


def photos(shared: Path, normalise: bool) -> npt.NDArray[np.float32]:
    """Four photos, [4, 3, 416, 416] BGR, letterboxed top-left or resized as each net wants it."""
    batch = []
    for path in sorted((shared / "data/coco-val/images").glob("*.jpg"))[::200][:4]:
        image = cv2.imread(str(path))
        if normalise:
            batch.append((cv2.resize(image, (SIDE, SIDE)).astype(np.float32) - MEAN) / STD)
            continue
        scale = SIDE / max(image.shape[:2])
        small = cv2.resize(image, None, fx=scale, fy=scale)[:SIDE, :SIDE]
        canvas = np.full((SIDE, SIDE, 3), 114, np.float32)
        canvas[: small.shape[0], : small.shape[1]] = small
        batch.append(canvas)
    assert len(batch) == 4
    return np.ascontiguousarray(np.stack(batch).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("name", "file", "normalise", "scores"),
    [
        ("nanodet_plus_m", "nanodet_plus_m_416.onnx", True, slice(0, 80)),
        ("yolox_nano", "yolox_nano_416.onnx", False, slice(4, 85)),
    ],
)
def test_equal_to_the_published_file(
    name: str, file: str, normalise: bool, scores: slice, shared: Path
) -> None:
    path = shared / "weights" / file
    net = build_net(name).eval()
    load_weights(net, path)
    batch = photos(shared, normalise)
    with torch.no_grad():
        ours = net.export_forward(torch.from_numpy(batch))
        assert isinstance(ours, torch.Tensor)
        got = ours.numpy()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"images": x[None]})[0] for x in batch])
    assert got.shape == expected.shape
    assert expected[..., scores].max() > 0.3, "no object found: the comparison would say little"
    error = np.abs(got - expected)
    print(f"{name}: largest difference {error.max():.1e}, scores {error[..., scores].max():.1e}")
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)
    np.testing.assert_allclose(got[..., scores], expected[..., scores], atol=1e-4, rtol=0)


@pytest.mark.parametrize("file", ["nanodet_m_416.onnx", "fastestdet_352.onnx"])
def test_another_detector_is_refused(file: str, shared: Path) -> None:
    for name in ("nanodet_plus_m", "yolox_nano"):
        with pytest.raises(ModelFileError, match="choose the network"):
            load_weights(build_net(name), shared / "weights" / file)
