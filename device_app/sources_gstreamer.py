"""GStreamer pipelines and Jetson's camera, through an OpenCV that has GStreamer built in."""

from __future__ import annotations

import re
import threading
from typing import Any

import cv2

from ..models.errors import SourceError
from .camera_options import CameraOptions
from .sources_opencv import LivePipe, quiet_opencv

SINK = "appsink drop=true max-buffers=1 sync=false"
"""Keeps the newest frame only: a slow reader never sees an old one."""
START_S = 8.0
"""So long a pipeline may take to give its first picture."""
JETSON_WH = (1280, 720)
JETSON_FPS = 30.0


class GStreamer(LivePipe):
    """A GStreamer pipeline.

    Args:
        pipeline: As for ``gst-launch-1.0``; what turns pictures into BGR and takes them out is put
            behind it unless it has an ``appsink`` of its own.
        options: Only ``rotate_deg`` is used: the rest is the pipeline's to say.
        name: What people call it.

    Raises:
        SourceError: This OpenCV has no GStreamer, the pipeline is wrong, or it gives nothing.
    """

    def __init__(
        self, pipeline: str, options: CameraOptions | None = None, *, name: str = "gst"
    ) -> None:
        """Starts the pipeline."""
        options = options or CameraOptions()
        unused = [given for given in options.given if given != "--rotate"]
        if unused:
            message = (
                f"{name}: expected {', '.join(unused)} in the pipeline itself (as "
                "video/x-raw,width=1280,framerate=30/1), found it as an option; move it there"
            )
            raise SourceError(message)
        if not has_gstreamer():
            message = (
                f"{name}: expected an OpenCV with GStreamer, found {cv2.__version__} without it; "
                "on Jetson take JetPack's, on Debian python3-opencv, in a venv with "
                "--system-site-packages and no OpenCV of its own"
            )
            raise SourceError(message)
        quiet_opencv()
        capture = _opened(whole_pipeline(pipeline))
        if capture is None:
            message = (
                f"{name}: expected a pipeline that starts, found one that does not; try "
                f"gst-launch-1.0 {shortened(pipeline)} ! fakesink"
            )
            raise SourceError(message)
        super().__init__(name, capture, options.rotate_deg)


def _opened(pipeline: str) -> Any:
    """Returns a capture of a pipeline; None if it does not start.

    OpenCV waits for ever for a pipeline that lost an element: it is left behind in its thread.
    """
    made: list[Any] = []

    def open_it() -> None:
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        if capture.isOpened() and not gone.is_set():
            made.append(capture)
        else:
            capture.release()

    gone = threading.Event()
    thread = threading.Thread(target=open_it, name="edgesight-gstreamer", daemon=True)
    thread.start()
    thread.join(START_S)
    if thread.is_alive():
        gone.set()
    return made[0] if made else None


def has_gstreamer() -> bool:
    """Returns whether this OpenCV can run GStreamer pipelines."""
    return re.search(r"GStreamer:\s+YES", cv2.getBuildInformation()) is not None


def whole_pipeline(pipeline: str) -> str:
    """Returns a pipeline that ends in BGR pictures for OpenCV, the newest only."""
    if re.search(r"\bappsink\b", pipeline):
        return pipeline
    return (
        f"{pipeline.strip().rstrip('!').strip()} ! videoconvert ! video/x-raw,format=BGR ! {SINK}"
    )


def jetson_pipeline(number: int, options: CameraOptions) -> str:
    """Returns the pipeline of a Jetson's CSI camera.

    Args:
        number: Of the sensor.
        options: What it is asked for.
    """
    width, height = options.size_wh or JETSON_WH
    fps = round(options.fps or JETSON_FPS)
    exposure = ""
    if options.exposure_us is not None:
        span_ns = 1000 * options.exposure_us
        exposure = f' exposuretimerange="{span_ns} {span_ns}"'
    return (
        f"nvarguscamerasrc sensor-id={number}{exposure} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1 ! "
        f"nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! {SINK}"
    )


def shortened(pipeline: str) -> str:
    """Returns a pipeline without the user names and passwords in it, on one line."""
    hidden = re.sub(r"(?<=://)[^/\s]*@", "***@", " ".join(pipeline.split()))
    hidden = re.sub(r"(user-pw|password)=\S+", r"\1=***", hidden)
    return hidden[:200]
