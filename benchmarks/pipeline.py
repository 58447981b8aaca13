"""What the camera app costs beside the bare network, and where it goes.

    pip install -e '.[dev]' && apt-get install mosquitto
    python benchmarks/pipeline.py --rounds 12

All kinds of blocks alternate in one process (bare network, pipeline, pipeline with a viewer at 15
pictures a second, the same with figures on the picture, /metrics read every second and MQTT), so
that what else the machine does falls on all of them; a ratio is the median over rounds. The viewer
is a process of its own on the same two cores. The second table is the time of single steps on a
640x480 picture, beside supervision's for the same boxes, in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from edgesight.device_app.command import SWITCH_INTERVAL_S
from edgesight.device_app.hud import draw_hud
from edgesight.device_app.live import LiveView
from edgesight.device_app.loop import Loop
from edgesight.device_app.mqtt import MqttLink
from edgesight.device_app.sources import ListSource
from edgesight.device_app.sources_photos import SAMPLES
from edgesight.device_app.tracking import DOUBTFUL
from edgesight.device_app.web.server import start_server
from edgesight.models.dataset import load_image
from edgesight.models.detector import SCORE_MIN_EVAL, OnnxDetector
from edgesight.models.draw import draw_detections
from edgesight.models.heads import HEADS
from edgesight.models.machine import machine
from edgesight.models.preprocess import Image
from edgesight.models.zoo import model_path

SIZE_WH = (640, 480)
FRAMES = 90
"""Of a block: long enough to time, short enough that all kinds see the same machine."""
VIEWER_FPS = 15
SCORE = 0.35
STEPS = 400
KINDS = ("bare", "plain", "viewer", "everything")
VIEWER = """
import sys, time, urllib.request
stream = urllib.request.urlopen(sys.argv[1] + "stream")
due = time.monotonic()
while True:
    stream.readline(), stream.readline()
    length = int(stream.readline().split()[1])
    stream.readline()
    stream.read(length), stream.readline()
    due = max(due + 1 / float(sys.argv[2]), time.monotonic() - 0.2)
    time.sleep(max(0, due - time.monotonic()))
"""


def pictures() -> list[Image]:
    """Returns the sample photos at 640x480, cropped to that shape."""
    found = []
    for path in sorted(SAMPLES.glob("*.jpg")):
        image = load_image(path)
        height, width = image.shape[:2]
        wanted = min(width, height * 4 // 3), min(height, width * 3 // 4)
        left, top = (width - wanted[0]) // 2, (height - wanted[1]) // 2
        crop = image[top : top + wanted[1], left : left + wanted[0]]
        found.append(cv2.resize(crop, SIZE_WH, interpolation=cv2.INTER_AREA))
    return found


@contextmanager
def broker() -> Iterator[str | None]:
    """Starts mosquitto on a free port; None where it is not installed."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "broker.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
        running = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
        try:
            time.sleep(0.5)
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            running.kill()
            running.wait()


def block(kind: str, detector: OnnxDetector, images: list[Image], url: str | None) -> float:
    """Runs one block; returns its frames per second."""
    if kind == "bare":
        tensor, _ = detector.preprocess(images[0])
        began = time.perf_counter()
        for _ in range(FRAMES):
            detector.infer(tensor)
        return FRAMES / (time.perf_counter() - began)
    live = LiveView()
    live.controls.plain = kind == "viewer"
    source = ListSource(images, loop=True)
    options: dict[str, Any] = {"frames": FRAMES, "track": True, "lossless": True}
    if kind == "plain":
        loop = Loop(source, detector, live=live, **options)
        loop.run()
        return FRAMES / (loop.stats.inference.last_s - loop.stats.started_s)
    server = start_server(live, "127.0.0.1", 0)
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, server.url, str(VIEWER_FPS)])
    link = MqttLink(url, live) if kind == "everything" and url else None
    try:
        until = time.monotonic() + 20
        while live.viewers == 0 and time.monotonic() < until:
            time.sleep(0.02)
        if link is not None:
            link.start()
            while link.state != "connected" and time.monotonic() < until:
                time.sleep(0.02)
        loop = Loop(source, detector, live=live, display=True, **options)
        loop.start()
        while not loop.wait(1.0):
            if kind == "everything":
                urllib.request.urlopen(server.url + "metrics").read()
        loop.finish()
        return FRAMES / (loop.stats.inference.last_s - loop.stats.started_s)
    finally:
        viewer.kill()
        viewer.wait()
        if link is not None:
            link.stop()
        server.stop()


def ratios(detector: OnnxDetector, images: list[Image], rounds: int) -> dict[str, Any]:
    """Returns the frames per second of each kind, and their ratios."""
    from tqdm import tqdm

    fps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    shuffled = random.Random(1)
    with broker() as url:
        for _ in tqdm(range(rounds), desc="rounds"):
            for kind in shuffled.sample(KINDS, len(KINDS)):
                fps[kind].append(block(kind, detector, images, url))
    pairs = {
        "pipeline / bare": ("plain", "bare"),
        "pipeline with a viewer / bare": ("viewer", "bare"),
        "with figures, metrics, MQTT / with a viewer": ("everything", "viewer"),
    }
    rows = {}
    for name, (a, b) in pairs.items():
        each = [x / y for x, y in zip(fps[a], fps[b], strict=True)]
        low, middle, high = np.percentile(each, (25, 50, 75))
        rows[name] = {"ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return {
        "fps": {kind: round(statistics.median(found), 2) for kind, found in fps.items()},
        "ratios": rows,
        "rounds": rounds,
        "frames_per_block": FRAMES,
        "mqtt": url is not None,
    }


def steps(detector: OnnxDetector, images: list[Image], floor: float, times: int) -> dict[str, Any]:
    """Returns the median milliseconds of single steps, ours and supervision's in turn.

    Args:
        detector: The model.
        images: What it looks at, in turn.
        floor: Score from which boxes are decoded: what the run asks for, or what AP asks for.
        times: Each step is run so often.
    """
    try:
        import supervision as sv
    except ImportError:
        sv = None
    spec = detector.spec
    ready = []
    for image in images:
        tensor, placement = detector.preprocess(image)
        raw = detector.infer(tensor)
        xyxy, score, label = HEADS[spec.head].decode(raw, spec, floor)
        ready.append((image, raw, placement, placement.to_source(xyxy), score, label))
    jobs: dict[str, Callable[[Any], Any]] = {
        "preprocess": lambda r: detector.preprocess(r[0]),
        "postprocess (decode, NMS)": lambda r: detector.postprocess(r[1], r[2], floor),
        "draw boxes": lambda r: draw_detections(
            r[0].copy(), detector.postprocess(r[1], r[2], SCORE), spec.classes
        ),
        "draw figures": lambda r: draw_hud(r[0].copy(), FIGURES),
    }
    if sv is not None:
        boxes, labels = sv.BoxAnnotator(), sv.LabelAnnotator()

        def theirs(r: Any) -> Any:
            return sv.Detections(xyxy=r[3], confidence=r[4], class_id=r[5]).with_nms(spec.nms_iou)

        def annotate(r: Any) -> Any:
            found = theirs(r)
            found = found[found.confidence >= SCORE]
            names = [
                f"{spec.classes[i]} {s:.2f}"
                for i, s in zip(found.class_id, found.confidence, strict=True)
            ]
            return labels.annotate(boxes.annotate(r[0].copy(), found), found, names)

        jobs["supervision: NMS"] = theirs
        jobs["supervision: NMS and annotators"] = annotate
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(times):
        one = ready[turn % len(ready)]
        for name, job in jobs.items():
            began = time.perf_counter()
            job(one)
            found[name].append(1e3 * (time.perf_counter() - began))
    result: dict[str, Any] = {name: round(statistics.median(t), 3) for name, t in found.items()}
    both = ("preprocess", "postprocess (decode, NMS)")
    result["pre- and post-processing"] = round(sum(result[name] for name in both), 3)
    result["boxes before NMS"] = statistics.median(len(r[4]) for r in ready)
    return result


FIGURES: Any = {
    "capture_fps": 30.0,
    "inference_fps": 29.7,
    "display_fps": 15.0,
    "stages_ms": {
        name: {"p50": 1.0, "p90": 1.5, "p99": 2.0}
        for name in ("capture", "preprocess", "inference", "postprocess", "draw", "encode")
    },
    "dropped": 3,
    "frames": 1000,
    "accuracy": {"kind": "agreement", "f1": 95.0, "f1_low": 93.0, "f1_high": 97.0, "frames": 20},
}


def main() -> None:
    """Prints both tables, and writes them as JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    detector = OnnxDetector(model_path(args.model), threads=1)
    images = pictures()
    found = {
        "model": args.model,
        "picture_wh": SIZE_WH,
        "steps_ms": {
            f"boxes from {floor:g}": steps(detector, images, floor, STEPS)
            for floor in (DOUBTFUL * SCORE, SCORE_MIN_EVAL)
        },
        **ratios(detector, images, args.rounds),
        "machine": machine(),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
