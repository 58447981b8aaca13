"""The options of ``edgesight run``; all of them can stand in a file, too (``config.py``)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..models.arguments import number_type, whole_number
from ..models.zoo import MODEL_HELP
from .camera_options import add_camera_arguments
from .config import Repeated, add_config_arguments
from .door import PORT_DEFAULT

CPU = "onnxruntime"  # of models/engines.py, which loads much


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``run``."""
    add = parser.add_argument
    add("--model", default="shipped", metavar="FILE", help=f"{MODEL_HELP} (default: %(default)s)")
    add(
        "--source",
        default="samples",
        metavar="WHAT",
        help="'samples', a camera number, picamera or jetson, 'gst:PIPELINE', a video or photo, a "
        "folder of photos (with COCO boxes in "
        "instances.json or without), a COCO JSON file, or a stream address rtsp://, http:// "
        "(default: samples)",
    )
    add(
        "--display",
        choices=("web", "window", "both", "none"),
        default="web",
        help="live web page, a window or screen of this machine (extra window), or nothing "
        "(default: %(default)s)",
    )
    add("--fullscreen", action="store_true", help="begin with the whole screen")
    add(
        "--score",
        type=number_type(float, 0.05, 1.0),
        default=0.35,
        help="score from which a box counts: shown, written, judged (default: %(default)s)",
    )
    add(
        "--threads",
        type=whole_number(1, 256),
        help="threads of the network (default: the cores less one, at most 4)",
    )
    add(
        "--engine",
        default=CPU,
        metavar="NAME",
        help="what runs the network: onnxruntime, cuda, tensorrt, openvino, as installed; or auto: "
        "the fastest that sees the same, measured once and remembered (default: %(default)s)",
    )
    add("--frames", type=whole_number(1, 10**12), metavar="N", help="end after N frames")
    add(
        "--speed",
        choices=("recorded", "max"),
        help="files at recorded speed (drops frames that come too fast, as a camera does) or as "
        "fast as the network can, every frame (default: recorded, with --display none: max)",
    )
    add("--loop", action="store_true", help="start files again at their end")
    add(
        "--no-track",
        action="store_true",
        help="do not follow objects from frame to frame (no ids, and counts of each frame alone)",
    )
    add(
        "--zone",
        type=_zone,
        action=Repeated,
        metavar="ZONE",
        help='part of the picture to watch, as "door: 0.1,0.2 0.5,0.2 0.5,0.9" (name, and points '
        'x,y in 0..1 of width and height), or "door[person,dog]: ..." for some classes alone; '
        "may be given several times, in a file as a list of texts",
    )
    add("--head", metavar="KIND", help="head of a foreign model that its file does not tell")
    add("--json", action="store_true", help="end with one JSON object as the last line")
    add = parser.add_argument_group("accuracy on the screen").add_argument
    add(
        "--reference",
        metavar="FILE|none",
        help="model to compare with (default: the source's own boxes where it has some, else the "
        "shipped float detector)",
    )
    add(
        "--accuracy-budget",
        type=number_type(float, 0.1, 100.0),
        default=5.0,
        metavar="PERCENT",
        help="share of one core that the reference may take (default: %(default)s)",
    )
    add = parser.add_argument_group("the live page").add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="address that the page listens on; beyond this machine it asks for a token, which the "
        "link that is printed holds (default: %(default)s)",
    )
    add(
        "--port",
        type=whole_number(0, 65535),
        help=f"port of the page (default: {PORT_DEFAULT}, or the next free one)",
    )
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the page's token, as the variable EDGESIGHT_TOKEN does (default: a new one for "
        "each run)",
    )
    add("--no-browser", action="store_true", help="do not open the page in a browser")
    add("--plain", action="store_true", help="no figures on the picture, as from a plain camera")
    add(
        "--models",
        type=Path,
        metavar="FOLDER",
        help="ONNX files that the page lets one change to while it runs; with a token it takes "
        "uploads, too",
    )
    add(
        "--model-gate",
        type=number_type(float, 0, 100),
        default=30.0,
        metavar="PERCENT",
        help="agreement with the running model below which another one is refused; 0: never "
        "(default: %(default)s)",
    )
    add(
        "--recordings",
        type=Path,
        metavar="FOLDER",
        help="where the page's record button puts its files (default: there is no such button)",
    )
    add(
        "--pre-roll",
        type=number_type(float, 0, 60),
        default=5.0,
        metavar="SECONDS",
        help="a recording begins so long before the button, if somebody looked (default: "
        "%(default)s)",
    )
    add(
        "--recordings-webm",
        action="store_true",
        help="make recordings WebM afterwards, which browsers play (else Matroska with the JPEGs "
        "as they are, for VLC, mpv and ffmpeg); costs a PC's core about 20 ms a picture",
    )
    add = parser.add_argument_group("files").add_argument
    add("--jsonl", type=Path, metavar="FILE", help="write the detections, one JSON object a frame")
    add("--video", type=Path, metavar="FILE", help="write the picture with its boxes (.mp4)")
    add(
        "--events",
        type=Path,
        metavar="FILE",
        help="append what happens, one JSON object a line, to a file in an existing folder; "
        "rotated at 10 MB, 5 older ones kept",
    )
    add = parser.add_argument_group("MQTT, with Home Assistant").add_argument
    add(
        "--mqtt",
        metavar="URL",
        help="tell a broker, and Home Assistant there: mqtt://user@host:1883/prefix or mqtts://; "
        "needs the extra mqtt; the password comes from --mqtt-password-file or the variable "
        "EDGESIGHT_MQTT_PASSWORD",
    )
    add("--mqtt-password-file", type=Path, metavar="FILE", help="holds the broker's password")
    add(
        "--mqtt-ca",
        type=Path,
        metavar="FILE",
        help="certificate (PEM) that the broker's is signed with (default: the system's)",
    )
    add(
        "--mqtt-discovery",
        default="homeassistant",
        metavar="PREFIX|none",
        help="where Home Assistant looks for devices (default: %(default)s)",
    )
    add("--name", help="of this camera, for people and topics (default: the host's name)")
    add_camera_arguments(parser)
    add_config_arguments(parser)


def _zone(text: str) -> Any:
    from .zones import parse_zone  # loads NumPy and OpenCV: not for --help

    return parse_zone(text)
