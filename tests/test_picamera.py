"""The Raspberry Pi camera: a real picamera2 on a software camera, in a root of its own.

``.ci/picamera-root DIR`` makes that root (as root, on Debian); ``EDGESIGHT_PICAMERA_ROOT`` says
where it is. Without it only what needs no camera is tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from edgesight.device_app.picamera import PiCamera, small_wh
from edgesight.models.errors import SourceError

ROOT = os.environ.get("EDGESIGHT_PICAMERA_ROOT", "")
REPOSITORY = Path(__file__).parents[1]
PACKAGE = ("__init__.py", "__main__.py", "py.typed", "models", "device_app", "deploy")
CONFIG = """%YAML 1.1
---
"Virtual0":
  supported_formats:
  - {width: 1280, height: 720, frame_rates: [30, 60]}
  - {width: 640, height: 480, frame_rates: [30, 60]}
  - {width: 640, height: 360, frame_rates: [30, 60]}
  frames: {path: "/frames/"}
  location: "CameraLocationBack"
  model: "soft"
"""


def test_without_picamera2_the_way_to_it_is_told() -> None:
    with pytest.raises(SourceError, match="sudo apt install python3-picamera2"):
        PiCamera()


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((1280, 720), (640, 360)),
        ((1536, 864), (640, 360)),
        ((640, 480), None),
        ((2304, 1296), (640, 360)),
        ((1920, 1440), (640, 480)),
    ],
)
def test_the_stream_for_the_network(size: tuple[int, int], small: tuple[int, int] | None) -> None:
    assert small_wh(size) == small


@pytest.mark.skipif(not ROOT, reason="EDGESIGHT_PICAMERA_ROOT names no root with picamera2")
@pytest.mark.timeout(600)
def test_a_real_picamera2_on_a_software_camera() -> None:
    import cv2
    import numpy as np

    root = Path(ROOT)
    place = root / "checks"
    shutil.rmtree(place, ignore_errors=True)
    for name in PACKAGE:
        source, goal = REPOSITORY / name, place / "edgesight" / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, goal)
    shutil.copytree(Path(__file__).parent / "inside", place / "inside")
    shutil.copytree(REPOSITORY / "device_app/samples", place / "inside/samples")
    shutil.copy(Path(__file__).with_name("source_contract.py"), place)
    frames = root / "frames"
    shutil.rmtree(frames, ignore_errors=True)
    frames.mkdir()
    for number, colour in enumerate(((0, 0, 255), (0, 255, 0), (255, 0, 0))):
        image = np.full((720, 1280, 3), colour, np.uint8)
        image[90:270, 60:260] = 255
        cv2.imwrite(str(frames / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
    config = root / "usr/share/libcamera/pipeline/virtual/virtual.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG)
    inside = (
        f"mount --bind /proc {root}/proc && mount --bind /sys {root}/sys && "
        f"mount --rbind /dev {root}/dev && exec chroot {root} /usr/bin/env "
        "PYTHONPATH=/checks PYTHONDONTWRITEBYTECODE=1 HOME=/root /opt/v/bin/python -m pytest -q "
        "-p no:cacheprovider /checks/inside/picamera_checks.py"
    )
    line = ["unshare", "--mount", "sh", "-c", inside]  # what is mounted goes with the process
    done = subprocess.run(line, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
