"""The door to all sources: what the user named becomes one that is open."""

from __future__ import annotations

import re
from pathlib import Path

from ..models.dataset import PHOTO_SUFFIXES
from ..models.errors import SourceError
from ..models.files import is_folder
from .camera_options import CameraOptions
from .sources import ReopeningSource, Source, redacted

STREAM_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "udp", "tcp", "srt")


def open_source(
    text: str,
    *,
    max_speed: bool = False,
    loop: bool = False,
    camera: CameraOptions | None = None,
) -> Source:
    """Opens what the user named.

    Args:
        text: ``samples``, a camera number or ``/dev/videoN``, ``picamera`` or ``picamera:N``,
            ``jetson`` or ``jetson:N``, ``gst:PIPELINE``, a video or photo file, a folder of photos
            (with COCO boxes if it has them), or the address of a stream.
        max_speed: Files as fast as they can be read, not at their recorded speed.
        loop: Whether files start again at their end; the samples always do.
        camera: What a camera is asked for.

    Raises:
        SourceError: It is absent, empty, corrupt or busy, or is no camera and asked for what only
            cameras have.
        DatasetError: The folder's photos or boxes are wrong.
    """
    options = camera or CameraOptions()
    if (opened := _open_camera(text, options)) is not None:
        return opened
    if options.given:
        message = (
            f"{redacted(text)}: expected a camera for {', '.join(options.given)}, found none; "
            "leave that out, or name a camera"
        )
        raise SourceError(message)
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme and scheme != "file":
        if scheme not in STREAM_SCHEMES:
            message = (
                f"{redacted(text)}: expected an address of {', '.join(STREAM_SCHEMES)}, "
                f"found {scheme}"
            )
            raise SourceError(message)
        from .sources_opencv import open_stream

        return open_stream(text, max_speed=max_speed, loop=loop)
    if text == "samples":
        from .sources_photos import SampleFootage

        return SampleFootage(paced=not max_speed)
    path = Path(text.removeprefix("file://")).expanduser()
    if not text or not _exists(path):
        message = (
            f"{text or '--source'}: expected a video, a photo, a folder, a camera number, an "
            "address or 'samples', found no such file; check the path"
        )
        raise SourceError(message)
    if is_folder(path) or path.suffix.lower() in (".json", *PHOTO_SUFFIXES):
        from .sources_photos import open_photos

        return open_photos(path, paced=not max_speed, loop=loop)
    from .sources_opencv import VideoFile

    return VideoFile(str(path), paced=not max_speed, loop=loop)


def _open_camera(text: str, options: CameraOptions) -> Source | None:
    """Opens a camera that is opened again when it is lost; None if the text names none."""
    if match := re.fullmatch(r"(?:/dev/video)?(\d{1,4})", text):
        from .sources_opencv import Webcam

        index = int(match[1])
        return ReopeningSource(lambda: Webcam(index, options))
    if match := re.fullmatch(r"picamera(?::(\d{1,2}))?", text):
        from .picamera import PiCamera

        number = int(match[1] or 0)
        return ReopeningSource(lambda: PiCamera(number, options))
    if match := re.fullmatch(r"jetson(?::(\d{1,2}))?", text):
        from .sources_gstreamer import GStreamer, jetson_pipeline

        if options.focus is not None:
            message = f"{text}: expected a camera with --focus, found one without; leave it out"
            raise SourceError(message)
        pipeline = jetson_pipeline(int(match[1] or 0), options)
        turned = CameraOptions(rotate_deg=options.rotate_deg)
        return ReopeningSource(lambda: GStreamer(pipeline, turned, name=text))
    if text.startswith("gst:"):
        from .sources_gstreamer import GStreamer

        return ReopeningSource(lambda: GStreamer(text.removeprefix("gst:"), options))
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that is closed to us
        return False
