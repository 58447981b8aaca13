"""What the tests of the camera app share; they load it with runpy, as tests are no package."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
from edgesight.models.spec import METADATA_KEY, ModelSpec
from onnx import TensorProto, helper, numpy_helper

CLASSES = ("bright", "dark")
SIZE = 32
CELLS = 21  # of strides 8, 16 and 32


def build_tiny(
    path: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    shift: float = 0.0,
    always: bool = False,
    work: int = 0,
) -> Path:
    """Writes a real ONNX detector of a few hundred bytes whose scores follow from the brightness.

    It sees ``bright`` in the upper left quarter with the picture's mean (0..1) as its score, and
    ``dark`` in the lower right quarter with one minus that.

    Args:
        path: Where to.
        classes: Names of the two.
        shift: Moves both boxes to the right by so many input pixels.
        always: Both scores are 0.9 whatever the picture.
        work: Matrix products of 256x256 that it does besides, to be slower.
    """
    boxes = np.zeros((4, CELLS), np.float32)
    boxes[:, 0] = (8 + shift, 8, 16, 16)  # centre x, y, width, height in input pixels
    boxes[:, 5] = (24 + shift, 24, 16, 16)
    slope, base = np.zeros((2, CELLS), np.float32), np.zeros((2, CELLS), np.float32)
    slope[0, 0], slope[1, 5], base[1, 5] = 1, -1, 1
    if always:
        slope[:] = 0
        base[0, 0] = base[1, 5] = 0.9
    constants = {"boxes": boxes, "slope": slope, "base": base}
    nodes = [helper.make_node("ReduceMean", ["picture"], ["mean_0"], keepdims=0)]
    for i in range(work):
        constants["matrix"] = np.full((256, 256), 1 / 256, np.float32)
        constants["zero"] = np.zeros((), np.float32)
        nodes += [
            helper.make_node("Add", ["matrix", f"mean_{i}"], [f"a_{i}"]),
            helper.make_node("MatMul", [f"a_{i}", "matrix"], [f"b_{i}"]),
            helper.make_node("ReduceMean", [f"b_{i}"], [f"c_{i}"], keepdims=0),
            helper.make_node("Mul", [f"c_{i}", "zero"], [f"d_{i}"]),
            helper.make_node("Add", [f"d_{i}", f"mean_{i}"], [f"mean_{i + 1}"]),
        ]
    constants["shape"] = np.array([1, 6, CELLS], np.int64)
    nodes += [
        helper.make_node("Mul", ["slope", f"mean_{work}"], ["scaled"]),
        helper.make_node("Add", ["scaled", "base"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["rows"], axis=0),
        helper.make_node("Reshape", ["rows", "shape"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 6, CELLS])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    spec = ModelSpec(
        head="yolov8",
        input_hw=(SIZE, SIZE),
        classes=classes,
        color="rgb",
        std=(255.0, 255.0, 255.0),
        resize="stretch",
        name=path.stem,
    )
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, os.fspath(path))
    return path


def write_video(path: Path, frames: int = 20, fps: float = 50.0) -> Path:
    """Writes a video whose frames get brighter by 10 each."""
    writer = cv2.VideoWriter(os.fspath(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (64, 48))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 10 * i % 250, np.uint8))
    writer.release()
    return path


def write_photo(path: Path, grey: int = 100, size_wh: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(os.fspath(path), np.full((size_wh[1], size_wh[0], 3), grey, np.uint8))
    return path


class MjpegServer:
    """A camera on the network: an endless MJPEG stream over HTTP that can die and come back."""

    def __init__(self) -> None:
        self.mode = "sending"
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if outer.mode == "refusing":
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                grey = 0
                with contextlib.suppress(OSError):
                    while outer.mode != "refusing":
                        time.sleep(0.01)
                        if outer.mode == "stalled":
                            continue
                        grey = (grey + 10) % 250
                        _, jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), grey, np.uint8))
                        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}"
                        self.wfile.write(head.encode() + b"\r\n\r\n" + jpeg.tobytes() + b"\r\n")

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/camera.mjpg"

    def close(self) -> None:
        self.mode = "refusing"
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def process(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Starts this Python with the package that is under test; ends it with the test."""
    parents = [entry for entry in sys.path if entry and (Path(entry) / "edgesight").is_dir()]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SSH_")}
    with subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | {"PYTHONPATH": os.pathsep.join(parents)},
    ) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                running.kill()


def end_limit_s() -> float:
    """Returns how long Ctrl-C may take to end a process; a busy machine is given time."""
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    return 10.0 if busy else 1.5
