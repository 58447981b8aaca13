"""GStreamer pipelines and Jetson's camera, through an OpenCV that has GStreamer built in."""

from __future__ import annotations

import re
import threading
import time
from fractions import Fraction
from typing import Any

import cv2

from ..models.errors import SourceError
from .camera_options import CameraOptions
from .latest import Latest
from .sources import BaseSource, Picture
from .sources_opencv import quiet_opencv, three_channels

SINK = "appsink drop=true max-buffers=1 sync=false"
"""Keeps the newest frame only: a slow reader never sees an old one."""
START_S = 8.0
"""So long a pipeline may take to give its first picture."""
FRAME_S = 5.0
"""And so long for each that follows."""
LEAVE_S = 1.0
STUCK_MAX = 3
JETSON_WH = (1280, 720)
JETSON_FPS = 30.0


class GStreamer(BaseSource):
    """A GStreamer pipeline.

    OpenCV waits for ever for a pipeline that does not start or stalls. So one thread owns the
    pipeline, and keeps its newest picture at hand; who waits too long for that leaves it behind.

    Args:
        pipeline: As for ``gst-launch-1.0``; what turns pictures into BGR and takes them out is put
            behind it unless it has an ``appsink`` of its own.
        options: Only ``rotate_deg`` is used: the rest is the pipeline's to say.
        name: What people call it.

    Raises:
        SourceError: This OpenCV has no GStreamer, the pipeline is wrong, or it gives nothing.
    """

    live = True

    def __init__(
        self, pipeline: str, options: CameraOptions | None = None, *, name: str = "gst"
    ) -> None:
        """Starts the pipeline and waits for its first picture."""
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
        _stuck[:] = [thread for thread in _stuck if thread.is_alive()]
        if len(_stuck) >= STUCK_MAX:  # each holds a device
            message = f"{name}: expected a pipeline that answers, found that it hangs; start again"
            raise SourceError(message)
        quiet_opencv()
        super().__init__(name, 0.0, rotate_deg=options.rotate_deg)
        self._slot: Latest[tuple[Any, float]] = Latest()
        self._own = threading.Event()  # set: the thread is to give the device back
        self._thread = threading.Thread(
            target=self._work, args=(whole_pipeline(pipeline),), name="edgesight-gst", daemon=True
        )
        self._thread.start()
        self._ahead = self._slot.get(START_S)
        if self._ahead is None:
            self._leave()
            message = (
                f"{name}: expected a pipeline that starts, found one that does not; try "
                f"gst-launch-1.0 {shortened(pipeline)} ! fakesink"
            )
            raise SourceError(message)

    def _work(self, pipeline: str) -> None:
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        try:
            if capture.isOpened():
                fps = capture.get(cv2.CAP_PROP_FPS)
                self.fps = fps if 0 < fps < 1000 else 0.0
            while capture.isOpened() and not self._own.is_set():
                ok, image = capture.read()
                if not ok or image is None or not image.size:
                    break
                self._slot.put((three_channels(image), time.monotonic()))
        finally:
            self._slot.close()
            capture.release()

    def _next(self) -> Picture | None:
        began = time.monotonic()
        found, self._ahead = self._ahead, None
        found = found or self._slot.get(FRAME_S)
        self.waited_s = time.monotonic() - began
        if found is None:
            message = (
                f"{self.name}: expected a frame, found none for {self.waited_s:.0f} s; check cable "
                "and power"
            )
            raise SourceError(message)
        return Picture(found[0], captured_s=found[1])

    def close(self) -> None:
        """Gives the device back, or leaves it to a thread that hangs."""
        self._own.set()
        self._slot.close(discard=True)
        super().close()

    def _release(self) -> None:
        self._leave()

    def _leave(self) -> None:
        self._own.set()
        self._slot.close(discard=True)
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            _stuck.append(self._thread)


_stuck: list[threading.Thread] = []


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
    fps = Fraction(options.fps or JETSON_FPS).limit_denominator(1001)
    exposure = ""
    if options.exposure_us is not None:
        span_ns = 1000 * options.exposure_us
        exposure = f' exposuretimerange="{span_ns} {span_ns}"'
    return (
        f"nvarguscamerasrc sensor-id={number}{exposure} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},"
        f"framerate={fps.numerator}/{fps.denominator} ! "
        f"nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! {SINK}"
    )


def shortened(pipeline: str) -> str:
    """Returns a pipeline without the user names and passwords in it, on one line."""
    hidden = re.sub(r"(?<=://)[^/\s]*@", "***@", " ".join(pipeline.split()))
    hidden = re.sub(r"""(user-pw|password)=("[^"]*"|'[^']*'|\S+)""", r"\1=***", hidden)
    return hidden[:200]
