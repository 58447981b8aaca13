"""Sources that OpenCV reads: video files, webcams (V4L2), and streams (RTSP, HTTP)."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..models.errors import SourceError
from .camera_options import CameraOptions
from .sources import BaseSource, Picture, ReopeningSource, Source, redacted

TIMEOUT_MS = 5000
"""So long a stream may take to open, and to give its next frame, before it counts as lost."""
LOW_DELAY = "fflags;nobuffer|flags;low_delay"
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_environment_lock = threading.Lock()


class VideoFile(BaseSource):
    """A video file, or a finite video behind an address.

    Args:
        path: Of the file.
        paced: At recorded speed, else as fast as it is read.
        loop: Whether it starts again at its end.

    Raises:
        SourceError: The file cannot be opened, or no frame of it can be decoded.
    """

    def __init__(self, path: str, *, paced: bool = True, loop: bool = False) -> None:
        """Opens the file and decodes its first frame."""
        self._path, self._loop = path, loop
        self._capture = _open(path)
        self._ahead = _decoded(self._capture) if self._capture.isOpened() else None
        if self._ahead is None:
            self._capture.release()
            raise SourceError(_not_a_video(path))
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        super().__init__(redacted(path), fps if 0 < fps < 1000 else 30.0, paced=paced)
        self._expected = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self._read = 0

    def _next(self) -> Picture | None:
        image, self._ahead = self._ahead, None
        if image is None:
            image = _decoded(self._capture)
        if image is None and self._read and self._loop:
            self._capture.release()
            self._capture, self._read = _open(self._path), 0
            image = _decoded(self._capture)
        if image is None:
            if 0 < self._read < 0.9 * self._expected:
                self.warnings.append(
                    f"{self.name}: expected {self._expected} frames, could decode {self._read}; "
                    "the file is damaged or cut short"
                )
            return None
        self._read += 1
        return Picture(image)

    def _release(self) -> None:
        self._capture.release()


class _Live(BaseSource):
    """A camera or a stream that OpenCV has open; losing it is an error, not an end."""

    live = True

    def __init__(self, name: str, capture: Any, rotate_deg: int = 0) -> None:
        self._capture = capture
        fps = capture.get(cv2.CAP_PROP_FPS)
        super().__init__(name, fps if 0 < fps < 1000 else 0.0, rotate_deg=rotate_deg)

    def _next(self) -> Picture | None:
        began = time.monotonic()
        grabbed = self._capture.grab()
        self.waited_s = time.monotonic() - began
        ok, image = self._capture.retrieve() if grabbed else (False, None)
        if not ok or image is None or image.size == 0:
            waited = f" for {self.waited_s:.0f} s" if self.waited_s >= 1 else ""
            message = f"{self.name}: expected a frame, found none{waited}; check cable and power"
            raise SourceError(message)
        return Picture(three_channels(image))

    def _release(self) -> None:
        self._capture.release()


class Webcam(_Live):
    """A camera of this machine.

    Args:
        index: Its number: 0 is ``/dev/video0``.
        options: What it is asked for.

    Raises:
        SourceError: There is none, it is busy, or it gives no frame.
    """

    def __init__(self, index: int, options: CameraOptions | None = None) -> None:
        """Opens the camera."""
        options = options or CameraOptions()
        if options.focus_dioptres is not None:
            message = (
                f"camera {index}: expected --focus auto, found dioptres, which USB cameras do not "
                "count in; set it with v4l2-ctl -c focus_absolute=N"
            )
            raise SourceError(message)
        linux = sys.platform.startswith("linux")
        quiet_opencv()
        device = Path(f"/dev/video{index}")
        if linux and not device.exists():  # asked first: OpenCV would search other interfaces
            raise SourceError(_no_camera(index))
        capture = cv2.VideoCapture(index, cv2.CAP_V4L2 if linux else cv2.CAP_ANY)
        if not capture.isOpened():
            capture.release()
            raise SourceError(_no_camera(index))
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        refused = _set(capture, options)
        super().__init__(f"camera {index}", capture, options.rotate_deg)
        self.warnings += [f"camera {index}: {line}" for line in refused]


def _set(capture: Any, options: CameraOptions) -> list[str]:
    """Asks a camera for what was wished, and returns what it did not do."""
    wanted: dict[str, list[tuple[int, float]]] = {}
    if options.size_wh is not None:
        width, height = options.size_wh
        sides = (cv2.CAP_PROP_FRAME_WIDTH, width), (cv2.CAP_PROP_FRAME_HEIGHT, height)
        if width * height > 640 * 480:  # more does not fit through USB 2 without compression
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*"MJPG"))
        wanted[f"{width}x{height} px"] = list(sides)
    if options.fps is not None:
        wanted[f"{options.fps:g} frames/s"] = [(cv2.CAP_PROP_FPS, options.fps)]
    if options.focus is not None:
        wanted["focus"] = [(cv2.CAP_PROP_AUTOFOCUS, float(options.focus == "auto"))]
    if options.exposure_us is not None:  # V4L2: 1 is manual, and it counts in 100 us
        exposure = (cv2.CAP_PROP_EXPOSURE, max(1.0, options.exposure_us / 100))
        wanted["exposure"] = [(cv2.CAP_PROP_AUTO_EXPOSURE, 1.0), exposure]
    refused = []
    for what, settings in wanted.items():
        done = [capture.set(key, value) for key, value in settings]
        got = [capture.get(key) for key, _ in settings]
        same = all(abs(g - v) < 0.5 for g, (_, v) in zip(got, settings, strict=True))
        if not (all(done) and same):
            given = "x".join(f"{value:g}" for value in got)
            size = settings[0][0] == cv2.CAP_PROP_FRAME_WIDTH
            told = f"gives {given}" if size or what.endswith("/s") else "does not do it"
            refused.append(f"asked for {what}, {told}")
    return refused


class Stream(_Live):
    """A stream behind an address; RTSP with as little delay as FFMPEG allows.

    Args:
        address: ``rtsp://``, ``http://`` and so on.

    Raises:
        SourceError: Nothing answers there, or it is no video.
    """

    def __init__(self, address: str) -> None:
        """Connects."""
        began = time.monotonic()
        capture = _open(address, low_delay=True)
        if not capture.isOpened():
            capture.release()
            message = (
                f"{redacted(address)}: expected a video stream, found none that answers "
                f"(after {time.monotonic() - began:.0f} s); check the address and that the server "
                "runs"
            )
            raise SourceError(message)
        super().__init__(redacted(address), capture)
        self.finite = 0 < capture.get(cv2.CAP_PROP_FRAME_COUNT) < 1e9  # live ones have no length


def open_stream(address: str, *, max_speed: bool, loop: bool) -> Source:
    """Opens an address: a live stream that is opened again when lost, or a finite video."""
    first: list[Stream] = [Stream(address)]
    if first[0].finite:
        first[0].close()
        return VideoFile(address, paced=not max_speed, loop=loop)
    return ReopeningSource(lambda: first.pop() if first else Stream(address))


def quiet_opencv() -> None:
    """Keeps OpenCV's and FFMPEG's own lines off the terminal: we say what is wrong ourselves.

    FFMPEG takes it only before its first use in the process.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    logging = getattr(getattr(cv2, "utils", None), "logging", None)
    if logging is not None:
        logging.setLogLevel(logging.LOG_LEVEL_SILENT)


def _open(target: str, *, low_delay: bool = False) -> Any:
    """Returns an FFMPEG capture with time limits and one decoding thread.

    Args:
        target: File or address.
        low_delay: For live streams: no buffering, which can cost a file its first frame.
    """
    quiet_opencv()
    wanted = {
        "CAP_PROP_OPEN_TIMEOUT_MSEC": TIMEOUT_MS,
        "CAP_PROP_READ_TIMEOUT_MSEC": TIMEOUT_MS,
        "CAP_PROP_N_THREADS": 1,  # more would add delay and take the network's core away
    }
    known = {key: value for key, value in wanted.items() if hasattr(cv2, key)}
    parameters = [v for key, value in known.items() for v in (getattr(cv2, key), value)]
    if not target.lower().startswith("rtsp"):
        return _with_options(target, parameters, LOW_DELAY if low_delay else None)
    # Over UDP a late packet is lost and does not hold up the newer ones; some networks block it.
    capture = _with_options(target, parameters, f"rtsp_transport;udp|{LOW_DELAY}")
    if not capture.isOpened():
        capture = _with_options(target, parameters, f"rtsp_transport;tcp|{LOW_DELAY}")
    return capture


def _with_options(target: str, parameters: list[int], options: str | None) -> Any:
    with _environment_lock:  # OpenCV takes FFMPEG's options from the environment only
        ours = options is not None and _OPTIONS not in os.environ
        if ours and options is not None:
            os.environ[_OPTIONS] = options
        try:
            return cv2.VideoCapture(target, cv2.CAP_FFMPEG, parameters)
        finally:
            if ours:
                del os.environ[_OPTIONS]


def _decoded(capture: Any) -> Any:
    ok, image = capture.read()
    return three_channels(image) if ok and image is not None and image.size else None


def three_channels(image: Any) -> Any:
    """Returns a picture that OpenCV has read as BGR."""
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(image[:, :, :3])


def _not_a_video(path: str) -> str:
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    return (
        f"{redacted(path)}: expected a video, found {size} bytes of which no frame can be decoded; "
        "copy the file again or convert it to H.264 in MP4"
    )


def _no_camera(index: int) -> str:
    device = Path(f"/dev/video{index}")
    others = sorted(p.name.removeprefix("video") for p in Path("/dev").glob("video[0-9]*"))
    if device.exists() and not os.access(device, os.R_OK | os.W_OK):
        return (
            f"camera {index}: expected to be allowed to read {device}, found no permission; "
            'sudo usermod -aG video "$USER", then log in again'
        )
    if device.exists():
        return (
            f"camera {index}: expected {device} to give pictures, found it busy or no camera; "
            f"close other programs, or choose another of {', '.join(others)}"
        )
    seen = f"cameras {', '.join(others)}" if others else "no camera at all"
    return (
        f"camera {index}: expected {device}, found {seen}; plug one in, choose another number, "
        "or use --source samples"
    )
