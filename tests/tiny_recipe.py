"""A recipe that runs in seconds: the tiny torch detector on drawn photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ["a", "b", "c"]
PRUNE = {"kind": "prune", "macs_ratio": 0.6, "photos": 6, "align": 4, "iterations": 1}
DISTILL = {"kind": "distill", "photos": 24, "batch": 4}
QUANTIZE = {"kind": "quantize", "photos": 6, "refine": 24}
VERIFY = {"kind": "verify", "resamples": 40, "latency_rounds": 4}
STEPS: list[dict[str, Any]] = [PRUNE, DISTILL, QUANTIZE, VERIFY]


def draw_photos(folder: Path, count: int = 24) -> Path:
    """Draws photos of coloured rectangles."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(count):
        image = np.full((72, 96, 3), 60, np.uint8)
        for _ in range(4):
            x, y = (int(v) for v in random.integers(0, 64, 2))
            w, h = (int(v) for v in random.integers(8, 48, 2))
            color = tuple(int(v) for v in random.integers(0, 256, 3))
            cv2.rectangle(image, (x, y), (x + w, y + h), color, -1)
        cv2.imwrite(str(folder / f"{i:02}.png"), image)
    return folder


def tiny_recipe(steps: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Returns the recipe's content; photos are expected in ``photos``, results go to ``out``."""
    values: dict[str, Any] = {
        "version": 1,
        "out": "out",
        "model": {"module": "tiny_net:make", "classes": CLASSES, "input_hw": [64, 64]},
        "data": {"photos": "photos", "hold_out": 4},
        "steps": STEPS if steps is None else steps,
    }
    return values | changes


def as_toml(values: dict[str, Any]) -> str:
    """Returns a recipe as TOML."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        return f'"{value}"' if isinstance(value, str | Path) else str(value)

    lines = [f"{k} = {text(v)}" for k, v in values.items() if k == "model" or k != "steps"]
    lines = [line for line in lines if not line.endswith("}")]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{k} = {text(v)}" for k, v in value.items())]
    for step in values["steps"]:
        lines += ["[[steps]]", *(f"{k} = {text(v)}" for k, v in step.items())]
    return "\n".join(lines) + "\n"
