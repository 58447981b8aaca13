"""Mosaics and shared batches: boxes go where the photos went, and nothing hangs on who asks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from edgesight.compression.augment import mosaic
from edgesight.compression.photos import Mosaic, PhotoLabels, PhotoStream
from edgesight.models.preprocess import fit
from edgesight.models.spec import ModelSpec

SPEC = ModelSpec("yolox", (96, 128), tuple("abcdef"))
HUES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]
ALWAYS = Mosaic(1.0, 10**6)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photo k shows one rectangle in the colour of class k on grey."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(3)
    for k, hue in enumerate(HUES):
        image = np.full((150, 200, 3), 110, np.uint8)
        x, y = (int(v) for v in random.integers(20, 70, 2))
        cv2.rectangle(image, (x, y), (x + 79, y + 59), hue, -1)
        np.save(folder / f"{k}.npy", np.array([x, y, x + 80, y + 60], np.float32))
        cv2.imwrite(str(folder / f"{k}.png"), image)
    return sorted(folder.glob("*.png"))


def labels(paths: list[Path]) -> list[PhotoLabels]:
    one = np.ones(1, np.float32)
    return [
        PhotoLabels(np.load(p.with_suffix(".npy"))[None], np.array([k]), one)
        for k, p in enumerate(paths)
    ]


def painted(image: np.ndarray, label: int) -> np.ndarray:
    """Where the hue of a class is: its bright channels stand out from its dark ones."""
    bright = np.array(HUES[label]) > 0
    gap = image[..., bright].min(-1).astype(int) - image[..., ~bright].max(-1)
    return gap > 50


def test_boxes_follow_into_the_mosaic(paths: list[Path]) -> None:
    stream = PhotoStream(paths, SPEC, 1, 0, labels(paths), mosaic=ALWAYS)
    checked = 0
    for position in range(30):
        image, pieces = stream.picture(position)
        assert len(pieces) == 4
        targets = stream.make(position).targets
        assert targets is not None
        shown = fit(image, SPEC)[0]
        for box, label in zip(targets[0].xyxy.numpy(), targets[0].label.tolist(), strict=True):
            if [piece.place for piece in pieces].count(label) > 1:
                continue  # the same photo twice
            rows, columns = np.nonzero(painted(shown, label))
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box, seen, atol=2.5)
            checked += 1
    assert checked > 40


def test_what_is_hardly_left_of_a_box_is_no_box(paths: list[Path]) -> None:
    given = labels(paths)
    stream = PhotoStream(paths, SPEC, 1, 0, given, mosaic=ALWAYS)
    shares = []
    for position in range(30):
        image, pieces = stream.picture(position)
        targets = stream.make(position).targets
        assert targets is not None
        kept = targets[0].label.tolist()
        shown = fit(image, SPEC)[1]
        for piece in pieces:
            if [p.place for p in pieces].count(piece.place) > 1:
                continue
            zoom = abs(piece.matrix[0, 0] * piece.matrix[1, 1]) * np.prod(shown.scale_xy)
            share = painted(fit(image, SPEC)[0], piece.place).sum() / (80 * 60 * zoom)
            if not 0.2 < share < 0.4:  # near the limit recolouring and rounding decide
                assert (piece.place in kept) == (share > 0.3)
                shares.append(share)
    assert min(shares) < 0.2 < 0.9 < max(shares)


def test_a_mosaic_is_made_of_four_photos_around_one_point(paths: list[Path]) -> None:
    images = [cv2.imread(str(p)) for p in paths[:4]]
    result, pieces = mosaic(images, range(4), np.random.default_rng(1), SPEC)
    assert result.shape == (96, 128, 3)
    area = sum((r - x) * (b - t) for x, t, r, b in (p.region for p in pieces))
    assert area == 96 * 128
    assert pieces[0].region[2:] == pieces[3].region[:2]
    for image in images:
        assert (image == 110).any(), "the photos stay as they are"


def test_the_same_every_time_and_none_at_the_end(paths: list[Path]) -> None:
    half = Mosaic(0.5, 40)
    one, two = (PhotoStream(paths, SPEC, 4, 0, labels(paths), mosaic=half) for _ in range(2))
    counts = [len(one.picture(position)[1]) for position in range(80)]
    assert set(counts[:40]) == {1, 4}
    assert set(counts[40:]) == {1}
    assert 10 < counts.count(4) < 30
    list(two.batches(2, 5))  # what was asked before does not matter
    assert torch.equal(one.make(7).images, two.make(7).images)
    plain = PhotoStream(paths, SPEC, 4, 0, labels(paths))
    for position in (p for p in range(40) if counts[p] == 1):
        assert np.array_equal(one.picture(position)[0], plain.picture(position)[0])
    assert one.description() != plain.description()


@pytest.mark.parametrize("count", [2, 4])
def test_parts_make_up_the_batch(count: int, paths: list[Path]) -> None:
    view = SPEC.with_changes(input_hw=(64, 64), input_format="uint8_nhwc", resize="stretch")
    made = [
        PhotoStream(
            paths, SPEC, 4, 0, labels(paths), mosaic=Mosaic(0.5, 99), views=[view], part=part
        ).make(3)
        for part in [(0, 1), *((n, count) for n in range(count))]
    ]
    whole, parts = made[0], made[1:]
    assert torch.equal(whole.images, torch.cat([p.images for p in parts]))
    assert torch.equal(whole.views[0].inputs, torch.cat([p.views[0].inputs for p in parts]))
    assert whole.views[0].inputs.shape == (4, 64, 64, 3)
    assert whole.placements == tuple(where for p in parts for where in p.placements)
    assert whole.targets is not None
    together = [t for p in parts for t in p.targets or ()]
    for a, b in zip(whole.targets, together, strict=True):
        assert torch.equal(a.xyxy, b.xyxy)


def test_a_view_is_what_the_other_network_sees(paths: list[Path]) -> None:
    view = SPEC.with_changes(input_hw=(64, 96), color="rgb", resize="letterbox_center")
    stream = PhotoStream(paths, SPEC, 1, 0, mosaic=Mosaic(0.5, 99), views=[view])
    image, _ = stream.picture(2)
    fitted, place = fit(image, view)
    seen = stream.make(2).views[0]
    wanted = torch.from_numpy(fitted[..., ::-1].transpose(2, 0, 1).astype(np.float32))[None]
    assert torch.equal(seen.inputs, wanted)
    assert seen.placements == (place,)
