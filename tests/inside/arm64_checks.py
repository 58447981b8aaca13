"""Run by an emulated board's Python, and by this machine's: what the package sees, as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
from pathlib import Path

import edgesight
import numpy as np
import onnxruntime
from edgesight.__main__ import main
from edgesight.device_app.sources_photos import SAMPLES
from edgesight.models.dataset import load_image
from edgesight.models.detector import OnnxDetector
from edgesight.models.zoo import model_path

SCORE = 0.3
PHOTOS = ("cat.jpg", "officer.jpg")
found: dict[str, object] = {
    "machine": platform.machine(),
    "python": platform.python_version(),
    "onnxruntime": onnxruntime.__version__,
    "package": str(Path(edgesight.__file__).parent),
    "inputs": {},
}
for name in ("shipped", "shipped-float"):
    detector = OnnxDetector(model_path(name))
    seen = {}
    for photo in PHOTOS:
        image = load_image(SAMPLES / photo)
        if name == "shipped":
            found["inputs"][photo] = np.asarray(detector.preprocess(image)[0]).ravel().tolist()
        boxes = detector(image, SCORE)
        seen[photo] = [
            [*map(float, box), float(score), int(label)]
            for box, score, label in zip(boxes.xyxy, boxes.score, boxes.label, strict=True)
        ]
    found[name] = seen
    # The same numbers into the network everywhere, whatever the picture's resize made of them.
    noise = np.random.default_rng(0).integers(0, 256, (*detector.spec.input_hw, 3), dtype=np.uint8)
    tensor = detector.preprocess(noise)[0]
    found[f"{name} raw"] = [float(v) for out in detector.infer(tensor) for v in out.ravel()[::50]]
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
    words = ["--display", "none", "--frames", "2", "--reference", "none", "--json"]
    code = main(["run", *words])
    found["run"] = {"code": code, **json.loads(told.getvalue().splitlines()[-1])}
print(json.dumps(found), flush=True)
os._exit(0)  # an emulator must not hang in a library's farewell
