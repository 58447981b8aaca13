"""Boxes and labels on a picture, with plain OpenCV."""

from __future__ import annotations

import colorsys
from functools import lru_cache

import cv2
import numpy as np

from .detections import Detections
from .preprocess import Image

FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN = 0.618033988749895  # steps of this part of a circle never come near an earlier one


@lru_cache(maxsize=512)
def class_color(label: int) -> tuple[int, int, int]:
    """Returns the BGR colour of a class: always the same, and unlike its neighbours'."""
    hue = (0.08 + label * GOLDEN) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 1.0)
    return int(blue * 255), int(green * 255), int(red * 255)


def text_color(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns black or white BGR, whichever can be read on the background."""
    blue, green, red = background
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else (255, 255, 255)


def draw_detections(image: Image, detections: Detections, classes: tuple[str, ...]) -> None:
    """Draws boxes with label and score into a picture.

    Args:
        image: uint8 BGR ``(height, width, 3)``; changed in place.
        detections: In pixels of this picture.
        classes: Names in the order of the labels.
    """
    height, width = image.shape[:2]
    scale = max(0.4, min(height, width) / 900)
    thick = max(1, round(scale * 4))
    # Weak boxes first, so that strong ones lie on top.
    for i in np.argsort(detections.score, kind="stable"):
        label = int(detections.label[i])
        left, top, right, bottom = (round(float(v)) for v in detections.xyxy[i])
        color = class_color(label)
        cv2.rectangle(image, (left, top), (right, bottom), color, thick)
        name = classes[label] if label < len(classes) else str(label)
        track = 0 if detections.track is None else int(detections.track[i])
        text = f"{name} {f'#{track} ' if track else ''}{detections.score[i]:.2f}"
        (text_w, text_h), base = cv2.getTextSize(text, FONT, scale, 1)
        box_h = text_h + base + 2
        y = top - box_h if top >= box_h else min(max(top, 0), max(0, height - box_h))
        x = min(max(0, left), max(0, width - text_w - 4))
        cv2.rectangle(image, (x, y), (x + text_w + 4, y + box_h), color, cv2.FILLED)
        origin = (x + 2, y + text_h + 2)
        cv2.putText(image, text, origin, FONT, scale, text_color(color), 1, cv2.LINE_AA)
