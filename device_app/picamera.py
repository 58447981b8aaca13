"""The Raspberry Pi camera, through picamera2: the main stream to show, a small one to look at."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from ..models.errors import SourceError
from ..models.preprocess import Image
from .camera_options import CameraOptions
from .pixels import CONVERTERS, to_bgr
from .sources import BaseSource, Picture

SIZE_WH = (1280, 720)
"""Of the main stream, if nothing else is asked for."""
SMALL_WIDTH_PX = 640
"""Of the stream for the network; a main stream that is no wider serves for both."""
TIMEOUT_S = 5.0
"""So long a frame may take before the camera counts as lost."""
BUFFERS = 4


class PiCamera(BaseSource):
    """A camera of libcamera, opened by picamera2.

    Frames are borrowed: each is copied out and given back at once, so the camera never waits for
    the network. ``queue`` is off: a frame that is asked for has ended after that.

    Args:
        number: Of the camera, as ``rpicam-hello --list-cameras`` counts them.
        options: What it is asked for.

    Raises:
        SourceError: There is no picamera2, no such camera, it is busy, or it cannot do that.
    """

    live = True

    def __init__(self, number: int = 0, options: CameraOptions | None = None) -> None:
        """Opens, configures and starts the camera."""
        options = options or CameraOptions()
        name = f"picamera {number}"
        self._camera = _opened(number, name)
        try:
            self._streams = _configured(self._camera, options)
            self._camera.start()
        except Exception as error:  # libcamera raises RuntimeError for everything
            self._camera.close()
            message = (
                f"{name}: expected it to start with {_asked(options)}, found: {_line(error)}; "
                "choose another --size or --fps"
            )
            raise SourceError(message) from error
        super().__init__(name, options.fps or 30.0, rotate_deg=options.rotate_deg)
        unknown = {s["format"] for s in self._streams.values()} - set(CONVERTERS)
        if unknown:
            self.close()
            message = (
                f"{name}: expected a picture in one of {', '.join(CONVERTERS)}, found "
                f"{', '.join(sorted(unknown))}; use --source N of its /dev/videoN"
            )
            raise SourceError(message)
        asked, got = options.size_wh, self._streams["main"]["size"]
        if asked is not None and tuple(got) != asked:
            self.warnings.append(
                f"{name}: asked for {asked[0]}x{asked[1]} px, gives {got[0]}x{got[1]}"
            )

    def _next(self) -> Picture | None:
        began = time.monotonic()
        job = self._camera.capture_request(wait=False)
        try:
            request = job.get_result(timeout=TIMEOUT_S)
        except Exception as error:  # of concurrent.futures, and what libcamera raises
            message = (
                f"{self.name}: expected a frame, found none for {time.monotonic() - began:.0f} s; "
                "check the ribbon cable and the power supply"
            )
            raise SourceError(message) from error
        self.waited_s = time.monotonic() - began
        try:
            image = self._picture(request, "main")
            small = self._picture(request, "lores") if "lores" in self._streams else None
            stamp_ns = request.get_metadata().get("SensorTimestamp")
        except (RuntimeError, ValueError) as error:
            message = f"{self.name}: expected a whole frame, found: {_line(error)}; check the cable"
            raise SourceError(message) from error
        finally:
            request.release()
        return Picture(image, small=small, captured_s=_monotonic_s(stamp_ns))

    def _picture(self, request: Any, stream: str) -> Image:
        from picamera2 import MappedArray

        told = self._streams[stream]
        with MappedArray(request, stream, reshape=False, write=False) as mapped:
            return to_bgr(mapped.array, told["format"], tuple(told["size"]), told["stride"])

    def _release(self) -> None:
        # A capture that never came would keep the camera's own queue, and with it "stop", waiting.
        with contextlib.suppress(Exception):
            self._camera.cancel_all_and_flush()
        for give_back in (self._camera.stop, self._camera.close):
            try:
                give_back()
            except Exception as error:  # a camera that is lost; the next may be all right
                self.warnings.append(f"{self.name}: closing it failed: {_line(error)}")


def small_wh(size_wh: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the size of the stream for the network: same sides' ratio, even; None: not needed."""
    width, height = size_wh
    if width <= SMALL_WIDTH_PX:
        return None
    return SMALL_WIDTH_PX, max(2, round(height * SMALL_WIDTH_PX / width / 2) * 2)


def _opened(number: int, name: str) -> Any:
    try:
        from picamera2 import Picamera2
    except ImportError as error:
        message = (
            f"{name}: expected picamera2, found none ({_line(error)}); sudo apt install "
            "python3-picamera2, and make the venv with --system-site-packages"
        )
        raise SourceError(message) from error
    except Exception as error:  # ValueError "numpy.dtype size changed": apt's parts beside pip's
        message = (
            f"{name}: expected picamera2 to load, found: {_line(error)}; if it names numpy, take "
            "pip's numpy out of the venv (pip uninstall numpy opencv-python-headless)"
        )
        raise SourceError(message) from error
    known = Picamera2.global_camera_info()
    if number >= len(known):
        seen = ", ".join(str(info.get("Model", "?")) for info in known) or "no camera at all"
        message = (
            f"{name}: expected camera {number}, found {seen}; check the ribbon cable, and see "
            "rpicam-hello --list-cameras"
        )
        raise SourceError(message)
    try:
        return Picamera2(number)
    except (RuntimeError, IndexError) as error:
        message = (
            f"{name}: expected a free camera, found it busy ({_line(error)}); end the other "
            "program that has it"
        )
        raise SourceError(message) from error


def _configured(camera: Any, options: CameraOptions) -> dict[str, Any]:
    """Configures the camera and returns what it really gives, by stream: format, size, stride."""
    import libcamera

    size = options.size_wh or SIZE_WH
    small = small_wh(size)
    controls: dict[str, Any] = {}
    if options.fps is not None:
        controls["FrameRate"] = options.fps
    if options.exposure_us is not None:
        controls["ExposureTime"] = options.exposure_us
    if options.focus is not None:
        controls["AfMode"] = 2 if options.focus == "auto" else 0  # libcamera: continuous, manual
    if options.focus_dioptres is not None:
        controls["LensPosition"] = options.focus_dioptres
    lacking = sorted(set(controls) - set(camera.camera_controls) - {"FrameRate"})
    if lacking:
        message = f"it has no {', '.join(lacking)}"
        raise RuntimeError(message)
    if "FrameDurationLimits" not in camera.camera_controls:
        controls.pop("FrameRate", None)
    config = camera.create_video_configuration(
        main={"size": size, "format": "RGB888"},  # B, G, R in memory
        lores=None if small is None else {"size": small, "format": "YUV420"},
        colour_space=libcamera.ColorSpace.Smpte170m(),  # as ``pixels`` takes it, at every size
        controls=controls,
        buffer_count=BUFFERS,
        queue=False,
    )
    camera.configure(config)
    given = camera.camera_configuration()
    return {key: dict(given[key]) for key in ("main", "lores") if given.get(key)}


def _monotonic_s(stamp_ns: int | None) -> float | None:
    """Returns a sensor's time (Linux's clock since boot) on the monotonic clock."""
    if not stamp_ns or not sys.platform.startswith("linux"):
        return None
    return stamp_ns / 1e9 - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def _asked(options: CameraOptions) -> str:
    width, height = options.size_wh or SIZE_WH
    return ", ".join([f"{width}x{height} px", *options.given])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
