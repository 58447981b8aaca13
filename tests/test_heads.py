"""Every decoder against a slow and plain one, recognition of heads, and NMS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from edgesight.models import heads
from edgesight.models.boxes import iou_matrix, nms_per_class
from edgesight.models.coco import COCO_CLASSES
from edgesight.models.detections import FloatArray
from edgesight.models.detector import OnnxDetector, decode
from edgesight.models.errors import ModelFileError
from edgesight.models.heads import HEADS
from edgesight.models.preprocess import Placement
from edgesight.models.recognise import read_spec
from edgesight.models.spec import ModelSpec

HW = (64, 96)
CLASSES = ("a", "b", "c")
Triple = tuple[tuple[float, ...], float, int]


def spec_of(head: str) -> ModelSpec:
    known = HEADS[head]
    classes = (*CLASSES, "d") if head == "ssdlite" else CLASSES
    return ModelSpec(head, HW, classes, resize="stretch", strides=known.strides, nms_iou=0.6)


def plain_cells(strides: Sequence[int]) -> list[tuple[int, int, int]]:
    return [
        (x, y, s)
        for s in strides
        for y in range(math.ceil(HW[0] / s))
        for x in range(math.ceil(HW[1] / s))
    ]


def expectation(logits: Sequence[float]) -> float:
    top = max(logits)
    weights = [math.exp(v - top) for v in logits]
    return sum(i * w for i, w in enumerate(weights)) / sum(weights)


def random_outputs(head: str, seed: int = 0) -> list[FloatArray]:
    random = np.random.default_rng(seed)

    def scores(n: int, width: int = 3) -> FloatArray:
        return (random.uniform(0, 1, (1, n, width)) ** 4).astype(np.float32)

    def normal(*shape: int) -> FloatArray:
        return random.normal(0, 2, (1, *shape)).astype(np.float32)

    counts = [math.ceil(HW[0] / s) * math.ceil(HW[1] / s) for s in HEADS[head].strides]
    n = sum(counts)
    if head == "yolox":
        return [np.concatenate([normal(n, 2), normal(n, 2) / 2, scores(n, 4)], axis=2)]
    if head == "nanodet_plus":
        return [np.concatenate([scores(n), normal(n, 32)], axis=2)]
    if head == "nanodet":  # in any order
        outputs = [scores(c) for c in counts] + [normal(c, 32) for c in counts]
        return [outputs[i] for i in (4, 0, 2, 5, 1, 3)]
    if head == "classify":
        return [normal(3)]
    if head == "yolov8":
        boxes = random.uniform(0, 60, (1, 4, n)).astype(np.float32)
        return [np.concatenate([boxes, scores(n).transpose(0, 2, 1)], axis=1)]
    n = len(plain_anchors())
    return [normal(n, 4), normal(n, 5)]  # boxes and scores, in any order


def plain_yolox(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    found: list[Triple] = []
    for row, (x, y, s) in zip(outputs[0][0].tolist(), plain_cells((8, 16, 32)), strict=True):
        cx, cy = (row[0] + x) * s, (row[1] + y) * s
        w, h = math.exp(row[2]) * s, math.exp(row[3]) * s
        for label, value in enumerate(row[5:]):
            if row[4] * value >= floor:
                box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                found.append((box, row[4] * value, label))
    return found


def plain_distribution(
    rows: Sequence[Sequence[float]], strides: Sequence[int], offset: float, floor: float
) -> list[Triple]:
    found: list[Triple] = []
    for row, (x, y, s) in zip(rows, plain_cells(strides), strict=True):
        cx, cy = (x + offset) * s, (y + offset) * s
        left, top, right, low = (s * expectation(row[3 + 8 * i : 11 + 8 * i]) for i in range(4))
        for label, value in enumerate(row[:3]):
            if value >= floor:
                found.append(((cx - left, cy - top, cx + right, cy + low), value, label))
    return found


def plain_nanodet_plus(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    return plain_distribution(outputs[0][0].tolist(), (8, 16, 32, 64), 0.0, floor)


def plain_nanodet(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    rows: list[list[float]] = []
    for cells in (96, 24, 6):
        level = sorted((o[0] for o in outputs if o.shape[1] == cells), key=lambda o: o.shape[1])
        rows += np.concatenate(level, axis=1).tolist()
    return plain_distribution(rows, (8, 16, 32), 0.5, floor)


def plain_yolov8(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    found: list[Triple] = []
    for cx, cy, w, h, *values in outputs[0][0].T.tolist():
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        found += [(box, v, label) for label, v in enumerate(values) if v >= floor]
    return found


def plain_anchors() -> list[tuple[float, ...]]:
    """SSDLite's default boxes by the rule of the SSD paper (section 2.2)."""
    scales = [0.2 + (0.95 - 0.2) / 5 * k for k in range(6)] + [1.0]
    rows, cols = math.ceil(HW[0] / 16), math.ceil(HW[1] / 16)
    found: list[tuple[float, ...]] = []
    for k in range(6):
        between = math.sqrt(scales[k] * scales[k + 1])
        shapes = [(scales[k], scales[k]), (between, between)]
        for ratio in (2, 3):
            wide, high = scales[k] * math.sqrt(ratio), scales[k] / math.sqrt(ratio)
            shapes += [(wide, high), (high, wide)]
        for y in range(rows):
            for x in range(cols):
                for w, h in shapes:
                    found.append(((x + 0.5) / cols, (y + 0.5) / rows, min(w, 1), min(h, 1)))
        rows, cols = math.ceil(rows / 2), math.ceil(cols / 2)
    return found


def plain_ssdlite(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    found: list[Triple] = []
    both = zip(outputs[1][0].tolist(), outputs[0][0].tolist(), plain_anchors(), strict=True)
    for logits, delta, (ax, ay, aw, ah) in both:
        total = sum(math.exp(v) for v in logits)
        cx, cy = ax + delta[0] / 10 * aw, ay + delta[1] / 10 * ah
        w, h = math.exp(delta[2] / 5) * aw, math.exp(delta[3] / 5) * ah
        box = (
            (cx - w / 2) * HW[1], (cy - h / 2) * HW[0], (cx + w / 2) * HW[1], (cy + h / 2) * HW[0]
        )  # fmt: skip
        for label, value in enumerate(logits[1:]):
            if math.exp(value) / total >= floor:
                found.append((box, math.exp(value) / total, label))
    return found


def plain_classify(outputs: Sequence[FloatArray], floor: float) -> list[Triple]:
    logits = outputs[0][0].tolist()
    total = sum(math.exp(v) for v in logits)
    box = (0.0, 0.0, float(HW[1]), float(HW[0]))
    scores = [math.exp(v) / total for v in logits]
    return [(box, v, label) for label, v in enumerate(scores) if v >= floor]


PLAIN: dict[str, Callable[[Sequence[FloatArray], float], list[Triple]]] = {
    "yolox": plain_yolox,
    "nanodet_plus": plain_nanodet_plus,
    "nanodet": plain_nanodet,
    "yolov8": plain_yolov8,
    "ssdlite": plain_ssdlite,
    "classify": plain_classify,
}


def test_every_head_has_a_plain_decoder_here() -> None:
    assert PLAIN.keys() == HEADS.keys()


@pytest.mark.parametrize("head", PLAIN)
@pytest.mark.parametrize("floor", [0.05, 0.25])
def test_decoder_agrees_with_the_plain_one(head: str, floor: float) -> None:
    outputs = random_outputs(head)
    xyxy, score, label = HEADS[head].decode(outputs, spec_of(head), floor)
    wanted = PLAIN[head](outputs, floor)
    assert (0 if head == "classify" else 9) < len(wanted) < heads.CANDIDATES_MAX
    assert len(score) == len(wanted)
    keys = np.column_stack([label, score, xyxy]).astype(np.float64)
    plain = np.array([(b, s, *box) for box, s, b in wanted], np.float64)
    if head == "yolov8":  # class by class, where the plain one goes cell by cell
        keys, plain = keys[np.lexsort(keys.T[1::-1])], plain[np.lexsort(plain.T[1::-1])]
    np.testing.assert_allclose(keys, plain, rtol=1e-4, atol=1e-3)


def test_of_too_many_candidates_the_best_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = random_outputs("nanodet_plus")
    ranked = sorted((s for _, s, _ in plain_nanodet_plus(outputs, 0.0001)), reverse=True)
    for most, floor in itertools.product(range(5, 200, 6), (0.0, 0.0001, 0.01)):
        monkeypatch.setattr(heads, "CANDIDATES_MAX", most)
        wanted = [score for score in ranked[:most] if score >= floor]
        _, score, _ = HEADS["nanodet_plus"].decode(outputs, spec_of("nanodet_plus"), floor)
        np.testing.assert_allclose(sorted(score, reverse=True), wanted, rtol=1e-6)


@pytest.mark.parametrize("head", PLAIN)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_diverged_network_does_not_stop_the_loop(
    head: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, placement = spec_of(head), Placement((1.0, 1.0), (0, 0), (HW[1], HW[0]))
    outputs = random_outputs(head)
    random = np.random.default_rng(1)
    for output in outputs:
        output[random.uniform(size=output.shape) < 0.1] = bad
    some = decode(outputs, spec, placement, 0.05)
    assert np.isfinite(some.xyxy).all()
    assert len(some) > 0
    monkeypatch.setattr(heads, "CANDIDATES_MAX", 10)
    assert len(decode([np.full_like(o, bad) for o in outputs], spec, placement, 0.05)) <= 100


def plain_nms(
    xyxy: FloatArray, score: FloatArray, label: Any, iou_max: float, limit: int
) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(score)), key=lambda i: -float(score[i])):
        overlaps = (
            float(iou_matrix(xyxy[i : i + 1], xyxy[k : k + 1])[0, 0])
            for k in kept
            if label[k] == label[i]
        )
        if all(overlap <= iou_max for overlap in overlaps):
            kept.append(i)
    return kept[:limit]


@pytest.mark.parametrize("seed", range(3))
def test_nms_agrees_with_the_plain_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    corner = random.uniform(-20, 60, (200, 2))
    xyxy = np.hstack([corner, corner + random.uniform(1, 60, (200, 2))]).astype(np.float32)
    score = random.uniform(0.01, 1, 200).astype(np.float32)
    label = random.integers(0, 3, 200)
    for limit in (20, 200):
        kept = nms_per_class(xyxy, score, label, 0.5, limit)
        assert kept.tolist() == plain_nms(xyxy, score, label, 0.5, limit)
    assert 20 < len(kept) < 200


def test_iou_by_hand() -> None:
    a = np.array([[0, 0, 10, 10], [5, 5, 5, 5]], np.float32)
    b = np.array([[0, 5, 10, 15], [20, 20, 30, 30], [5, 5, 5, 5]], np.float32)
    wanted = np.array([[1 / 3, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(iou_matrix(a, b), wanted, atol=1e-6)


def shapes_of(head: str) -> dict[str, tuple[int, ...]]:
    return {f"out{i}": output.shape for i, output in enumerate(random_outputs(head))}


@pytest.mark.parametrize("head", PLAIN)
def test_head_is_recognised_by_its_outputs(head: str) -> None:
    named = head if head == "classify" else None  # too little tells it
    spec = read_spec({"images": (1, 3, *HW)}, shapes_of(head), {}, named)
    assert spec.head == head
    assert len(spec.classes) == (4 if head == "ssdlite" else 3)
    assert spec.strides == HEADS[head].strides
    assert (spec.resize, spec.color, spec.mean) == (
        HEADS[head].resize, HEADS[head].color, HEADS[head].mean
    )  # fmt: skip


def test_class_names_come_from_metadata_or_coco() -> None:
    inputs, names = {"images": (1, 3, *HW)}, "{0: 'x', 1: 'y', 2: 'z'}"
    assert read_spec(inputs, shapes_of("yolox"), {"names": names}).classes == ("x", "y", "z")
    hostile = "__import__('os').abort()"
    spec = read_spec(inputs, shapes_of("yolox"), {"names": hostile})
    assert spec.classes == ("class 0", "class 1", "class 2")
    assert read_spec(inputs, {"o": (1, 126, 85)}, {}).classes == COCO_CLASSES


def test_two_heads_fit_so_the_user_must_say() -> None:
    inputs, outputs = {"images": (1, 3, 32, 32)}, {"out": (1, 21, 21)}
    with pytest.raises(
        ModelFileError, match=r"expected the raw outputs.*--head yolox.nanodet_plus"
    ):
        read_spec(inputs, outputs, {})
    assert len(read_spec(inputs, outputs, {}, "yolox").classes) == 16
    assert len(read_spec(inputs, outputs, {}, "yolov8").classes) == 17


@pytest.mark.parametrize(
    ("inputs", "outputs", "head", "complaint"),
    [
        ({"x": (1, 3, 352, 352)}, {"o": (1, 85, 22, 22)}, None, "found o .1, 85, 22, 22.*--head"),
        (
            {"x": (1, 3, 64, 96)},
            {"o": (1, 126, 85)},
            "nanodet",
            "expected the outputs of a nanodet",
        ),
        ({"x": (1, 3, 64, 96)}, {"o": (1, 126, 85)}, "yolo", "--head: expected one of .*'yolo'"),
        ({"x": (1, 3, 0, 0)}, {"o": (1, 126, 85)}, None, "fixed size"),
        ({"x": (1, 1, 64, 96)}, {"o": (1, 126, 85)}, None, "fixed size"),
        ({"x": (1, 3, 64, 96), "y": (1,)}, {"o": (1, 126, 85)}, None, "expected one input"),
        ({"x": (1, 3, 64, 96)}, {}, None, "known head"),
        ({"x": (1, 3, 64, 96)}, {"o": (1, 126, 5)}, None, "known head"),
    ],
)
def test_what_fits_no_head_is_refused(
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
    head: str | None,
    complaint: str,
) -> None:
    with pytest.raises(ModelFileError, match=complaint):
        read_spec(inputs, outputs, {}, head)


def test_a_yolov8_export_gives_its_boxes(tiny_onnx: Any) -> None:
    """As Ultralytics exports it: [1, 4 + classes, n], names in the metadata, no spec of ours."""
    raw = np.zeros((1, 6, 21), np.float32)
    raw[0, :, 3] = [8, 16, 8, 16, 0.1, 0.9]  # centre x, y, width, height, scores
    raw[0, :, 4] = [8, 17, 8, 16, 0.0, 0.6]  # overlaps the first: dropped
    raw[0, :, 9] = [24, 16, 8, 4, 0.7, 0.0]
    path = tiny_onnx({"output0": raw}, metadata={"names": "{0: 'cat', 1: 'dog'}"})
    detector = OnnxDetector(path)
    assert (detector.spec.head, detector.spec.classes) == ("yolov8", ("cat", "dog"))
    found = detector(np.zeros((16, 32, 3), np.uint8), 0.3)  # letterboxed: 8 px above and below
    assert found.label.tolist() == [1, 0]
    np.testing.assert_allclose(found.score, [0.9, 0.7], rtol=1e-6)
    np.testing.assert_allclose(found.xyxy, [[4, 0, 12, 16], [20, 6, 28, 10]], atol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [({"task": "pose"}, "task 'pose'"), ({"names": "{0: 'person'}"}, "1 class names")],
)
def test_what_only_looks_like_a_detector_is_refused(metadata: dict[str, str], says: str) -> None:
    inputs, outputs = {"images": (1, 3, 64, 64)}, {"output0": (1, 56, 84)}
    with pytest.raises(ModelFileError, match=says):
        read_spec(inputs, outputs, metadata)
    assert read_spec(inputs, outputs, metadata, "yolov8").head == "yolov8"
