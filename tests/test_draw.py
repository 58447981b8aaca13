from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from edgesight.models.detections import Detections
from edgesight.models.draw import class_color, draw_detections, text_color


def one_box(xyxy: list[float], label: int = 0, score: float = 0.9) -> Detections:
    return Detections(
        np.array([xyxy], np.float32), np.array([score], np.float32), np.array([label], np.int64)
    )


def test_box_is_drawn_where_it_is_in_its_class_colour() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    draw_detections(image, one_box([50, 60, 150, 160], label=3), ("a", "b", "c", "d"))
    assert tuple(image[160, 100]) == class_color(3)
    assert tuple(image[110, 150]) == class_color(3)
    assert not image[110, 100].any(), "the inside of a box stays as it was"
    assert not image[190, 290].any()


def test_no_detections_leave_the_picture_alone() -> None:
    image = np.full((40, 40, 3), 7, np.uint8)
    draw_detections(image, Detections.empty(), ("a",))
    assert (image == 7).all()


@pytest.mark.parametrize("box", [[-50, -50, 20, 20], [280, 180, 400, 300], [0, 0, 300, 200]])
def test_label_stays_inside_the_picture(box: list[float]) -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    draw_detections(image, one_box(box), ("a long class name",))
    filled = (image == np.array(class_color(0))).all(axis=2)
    assert filled.sum() > 300, "the label's background is to be seen whole"


def test_label_beyond_the_classes_is_drawn_as_its_number() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    draw_detections(image, one_box([10, 40, 60, 90], label=99), ("only",))
    assert image.any()


def test_the_stronger_of_two_equal_boxes_lies_on_top() -> None:
    image = np.zeros((200, 300, 3), np.uint8)
    both = Detections(
        np.array([[50, 60, 150, 160]] * 2, np.float32),
        np.array([0.9, 0.5], np.float32),
        np.array([1, 2]),
    )
    draw_detections(image, both, ("a", "b", "c"))
    assert tuple(image[160, 100]) == class_color(1)


def test_neighbouring_classes_differ_and_text_can_be_read() -> None:
    colors = [np.array(class_color(i), float) for i in range(80)]
    nearest = min(np.abs(a - b).sum() for a, b in pairwise(colors))
    assert nearest > 100
    assert text_color((255, 255, 255)) == (0, 0, 0)
    assert text_color((120, 0, 0)) == (255, 255, 255)
