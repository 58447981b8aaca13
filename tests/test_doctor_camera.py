"""The doctor on cameras: absent, closed to the user, really held by another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from edgesight.deploy.doctor_camera import examine_camera
from edgesight.deploy.finding import Finding, Probe

HOLD = "import sys, time; held = open(sys.argv[1]); print('open', flush=True); time.sleep(60)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with one camera, and the processes of this one."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "proc").symlink_to("/proc")
    add(tmp_path, 0, "HD Webcam")
    return tmp_path


def add(root: Path, number: int, name: str, index: int = 0) -> Path:
    device = root / f"dev/video{number}"
    device.touch()
    device.chmod(0o660)
    folder = root / f"sys/class/video4linux/video{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "index").write_text(f"{index}\n")
    return device


def add_tool(root: Path, name: str, script: str) -> None:
    tool = root / "usr/bin" / name
    tool.parent.mkdir(parents=True, exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def look(root: Path, wanted: str | None = None, **others: Any) -> list[Finding]:
    return examine_camera(Probe(root, environ={"PATH": "/usr/bin:/bin"}, **others), wanted)


def test_a_free_camera(root: Path) -> None:
    found = look(root, uid=0)
    assert [(f.name, f.severity) for f in found] == [("camera /dev/video0", "ok")]
    assert found[0].found.startswith("HD Webcam; free")


@pytest.mark.parametrize("wanted", ["0", "/dev/video0", "/dev/v4l/by-id/usb-cam"])
def test_a_busy_camera_and_its_holder(root: Path, wanted: str) -> None:
    (root / "dev/v4l/by-id").mkdir(parents=True)
    (root / "dev/v4l/by-id/usb-cam").symlink_to("../../video0")
    command = [sys.executable, "-c", HOLD, str(root / "dev/video0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            (unasked,) = look(root, uid=0)
            (asked,) = look(root, wanted, uid=0)
            assert (unasked.severity, asked.severity) == ("warning", "error")
            assert "held by python" in asked.found
            assert f"(process {holder.pid})" in asked.found
            assert str(holder.pid) in asked.mend or "stop" in asked.mend
        finally:
            holder.kill()
    assert look(root, wanted, uid=0)[0].severity == "ok"


@pytest.mark.parametrize(
    ("cgroup", "mend"),
    [
        ("0::/system.slice/motion.service\n", "sudo systemctl stop motion.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/cheese.service\n",
         "systemctl --user stop cheese.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.scope\n", "kill 4242"),
        ("0::/\n", "kill 4242"),
    ],
)  # fmt: skip
def test_a_holders_service_is_stopped_not_killed(root: Path, cgroup: str, mend: str) -> None:
    (root / "proc").unlink()
    process = root / "proc/4242"
    (process / "fd").mkdir(parents=True)
    (process / "fd/7").symlink_to("/dev/video0")
    (process / "comm").write_text("motion\n")
    (process / "cgroup").write_text(cgroup)
    (found,) = look(root, "0", uid=0)
    assert found.found == "HD Webcam: held by motion (process 4242)"
    assert found.mend == mend


def test_a_user_outside_of_the_group(root: Path) -> None:
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nanna:x:54321:54321::/:/bin/sh\n")
    stranger = {"uid": 54321, "groups": frozenset({54321})}
    (found,) = look(root, **stranger)
    assert (found.severity, found.found) == ("warning", "HD Webcam: no permission")
    assert found.mend.startswith("sudo usermod -aG video anna ")
    assert look(root, "0", **stranger)[0].severity == "error"
    group = (root / "dev/video0").stat().st_gid
    assert look(root, uid=54321, groups=frozenset({group}))[0].severity == "ok"


def test_no_camera(tmp_path: Path) -> None:
    (found,) = look(tmp_path)
    assert (found.name, found.severity) == ("cameras", "note")
    (asked,) = look(tmp_path, "2")
    assert (asked.name, asked.severity) == ("camera 2", "error")
    assert asked.found == "no such device; found no /dev/video*"
    assert "v4l2-ctl" in asked.mend


@pytest.mark.parametrize("wanted", ["7", "/dev/video7", "/etc/passwd", "rubbish", "/dev"])
def test_another_camera_than_there_is(root: Path, wanted: str) -> None:
    (found,) = look(root, wanted)
    assert (found.severity, found.found) == ("error", "no such device; found /dev/video0")


def test_what_is_no_camera_is_not_taken_for_one(root: Path) -> None:
    add(root, 1, "HD Webcam", index=1)
    for number, name in enumerate(("bcm2835-codec-decode", "pispbe-input", "rp1-cfe-csi2_ch0")):
        add(root, 10 + number, name)
    add(root, 2, "Other Camera")
    assert [f.name for f in look(root, uid=0)] == ["camera /dev/video0", "camera /dev/video2"]


LISTED = """cat <<END
Available cameras
-----------------
0 : imx708 [4608x2592 10-bit RGGB] (/base/axi/pcie@120000/rp1/i2c@88000/imx708@1a)
    Modes: 'SRGGB10_CSI2P' : 1536x864 [120.13 fps - (768, 432)/3072x1728 crop]
1 : ov5647 [2592x1944] (/base/x)
END"""


def test_cameras_on_ribbons(tmp_path: Path) -> None:
    add_tool(tmp_path, "rpicam-hello", LISTED)
    found = look(tmp_path)
    assert found == [Finding("camera on a ribbon", "ok", "0: imx708, 1: ov5647")]
    assert look(tmp_path, "picamera") == found


@pytest.mark.parametrize(
    ("script", "severity", "found"),
    [
        ("echo 'No cameras available!'", "note", "none found"),
        ("echo 'no cameras available' >&2; exit 255", "note", "none found"),
        ("exit 127", "warning", "rpicam-hello ends with exit code 127"),
        ("kill -SEGV $$", "warning", "rpicam-hello dies of SIGSEGV"),
    ],
)
def test_no_camera_on_a_ribbon(tmp_path: Path, script: str, severity: str, found: str) -> None:
    add_tool(tmp_path, "rpicam-hello", script)
    first = look(tmp_path)[0]
    assert (first.severity, first.found) == (severity, found)
    assert first.mend
    last = look(tmp_path, "picamera")[-1]
    assert (last.name, last.severity) == ("camera picamera", "error")


def test_a_ribbon_camera_that_cannot_be_looked_for(tmp_path: Path) -> None:
    (found,) = look(tmp_path, "picamera:0")
    assert found.severity == "error"
    assert "rpicam-apps" in found.mend
