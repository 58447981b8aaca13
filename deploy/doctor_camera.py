"""The doctor on cameras: which there are, who may open them, who has them open."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from .finding import Finding, Probe

INNARDS: Final = ("codec", "isp", "hevc", "pispbe", "rp1-cfe", "unicam", "csi", "jpeg", "vdec")
"""Parts of the names of video devices that are no cameras but a chip's own parts."""
DEVICE: Final = re.compile(r"video\d+")
LISTERS: Final = ("rpicam-hello", "libcamera-hello")
LISTED: Final = re.compile(r"^\s*(\d+)\s*:\s*(\S+)", re.MULTILINE)


def examine_camera(probe: Probe, wanted: str | None = None) -> list[Finding]:
    """Returns what there is to say of this machine's cameras.

    Args:
        probe: The machine.
        wanted: The camera that must be there: a number, a device file, or ``picamera``.
    """
    devices = [device for device in _devices(probe) if not _is_innards(probe, device)]
    found = list[Finding]()
    ribbon = _ribbon(probe)
    if ribbon is not None:
        found.append(ribbon)
    seen = ribbon is not None and ribbon.severity == "ok"
    if wanted is not None and wanted.partition(":")[0] == "picamera":
        return [*found, *_picamera(probe, seen, ribbon is not None)]
    if wanted is not None:
        devices = [_device(probe, wanted)]
        if not (devices[0].exists() and DEVICE.fullmatch(devices[0].name)):
            there = ", ".join(f"/dev/{d.name}" for d in _devices(probe)) or "no /dev/video*"
            why = "the camera is not plugged in, has no power, or has another number"
            mend = "v4l2-ctl --list-devices   # sudo apt install v4l-utils; lsusb: is it there?"
            name = f"camera {wanted}"
            return [*found, Finding(name, "error", f"no such device; found {there}", why, mend)]
    elif not devices and not seen:
        why = "samples, videos and streams still run"
        mend = "lsusb   # plug in a camera, then: edgesight doctor --camera 0"
        return [*found, Finding("cameras", "note", "none found", why, mend)]
    for device in devices:
        found.append(_one(probe, device, wanted is not None))
    return found


def _devices(probe: Probe) -> list[Path]:
    def number(path: Path) -> int:
        return int(path.name.removeprefix("video"))

    return sorted(
        (path for path in probe.glob("dev/video*") if DEVICE.fullmatch(path.name)),
        key=number,
    )


def _device(probe: Probe, wanted: str) -> Path:
    if wanted.isdecimal():
        return probe.root / f"dev/video{wanted}"
    path = probe.root / wanted.lstrip("/")
    return path.resolve() if path.is_symlink() else path


def _is_innards(probe: Probe, device: Path) -> bool:
    """Whether it is a chip's part, or a camera's second device, which tells but shows nothing."""
    folder = f"sys/class/video4linux/{device.name}"
    name = (probe.text(f"{folder}/name") or "").lower()
    second = (probe.text(f"{folder}/index") or "0") != "0"
    return second or any(word in name for word in INNARDS)


def _one(probe: Probe, device: Path, wanted: bool) -> Finding:
    kind = probe.text(f"sys/class/video4linux/{device.name}/name") or "unnamed"
    name, said = f"camera /dev/{device.name}", kind
    if not _may_open(probe, device):
        why = "this user may not open it; cameras belong to the group video"
        mend = f"sudo usermod -aG video {_user(probe)}   # then log in again"
        return Finding(name, "error" if wanted else "warning", f"{said}: no permission", why, mend)
    holders, closed = _holders(probe, device)
    if holders:
        process, command = holders[0]
        found = f"{said}: held by {command} (process {process})"
        why = "only one program can have a camera's pictures at a time"
        mend = _stop(probe, process)
        return Finding(name, "error" if wanted else "warning", found, why, mend)
    if closed:
        return Finding(name, "ok", f"{said}; free, as far as this user can see")
    return Finding(name, "ok", f"{said}; free")


def _may_open(probe: Probe, device: Path) -> bool:
    """Whether the user may read and write it, from its owner, group and mode."""
    try:
        state = device.stat()
    except OSError:
        return False
    if probe.uid == 0:
        return True
    shift = 6 if state.st_uid == probe.uid else 3 if state.st_gid in probe.groups else 0
    return (state.st_mode >> shift & 6) == 6


def _user(probe: Probe) -> str:
    for line in (probe.text("etc/passwd") or "").splitlines():
        words = line.split(":")
        if len(words) > 2 and words[2] == str(probe.uid):
            return words[0]
    return '"$USER"'


def _holders(probe: Probe, device: Path) -> tuple[list[tuple[int, str]], bool]:
    """Returns who has a device open, and whether some processes would not be looked into."""
    names = {str(device), f"/dev/{device.name}", os.path.realpath(device)}
    holders, closed = list[tuple[int, str]](), False
    for folder in probe.glob("proc/[0-9]*"):
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            handles = list((folder / "fd").iterdir())
        except PermissionError:
            closed = True
            continue
        except OSError:  # it has ended
            continue
        for handle in handles:
            try:
                target = str(handle.readlink())
            except OSError:
                continue
            if target in names:
                command = probe.text(folder.relative_to(probe.root) / "comm") or "a program"
                holders.append((int(folder.name), command))
                break
    return holders, closed


def _stop(probe: Probe, process: int) -> str:
    """Returns the command that ends a process, by its service if it has one."""
    group = (probe.text(f"proc/{process}/cgroup") or "").splitlines()
    units = [part for line in group for part in line.split("/") if part.endswith(".service")]
    if not units:
        return f"kill {process}"
    if units[0].startswith("user@") and len(units) > 1:
        return f"systemctl --user stop {units[-1]}"
    return (
        f"kill {process}" if units[-1].startswith("user@") else f"sudo systemctl stop {units[-1]}"
    )


def _ribbon(probe: Probe) -> Finding | None:
    """Asks the Raspberry Pi's own tool for the cameras on its ribbon cables."""
    tool = next((t for name in LISTERS if (t := probe.tool(name))), None)
    if tool is None:
        return None
    ran = probe.run(tool, "--list-cameras")
    listed = LISTED.findall(ran.out)
    if listed:
        names = ", ".join(f"{number}: {kind}" for number, kind in listed)
        return Finding("camera on a ribbon", "ok", names)
    if ran.code == 0 or "no cameras" in (ran.out + ran.err).lower():
        why = "libcamera sees none: the ribbon cable is loose or turned, or the sensor is not named"
        mend = (
            "sudo poweroff   # seat the cable; see that /boot/firmware/config.txt says "
            "camera_auto_detect=1, then: rpicam-hello --list-cameras"
        )
        return Finding("camera on a ribbon", "note", "none found", why, mend)
    mend = "sudo apt install --reinstall -y rpicam-apps-lite"
    return Finding("camera on a ribbon", "warning", f"{Path(tool).name} {ran.how}", "", mend)


def _picamera(probe: Probe, seen: bool, has_tool: bool) -> list[Finding]:
    """Returns what hinders ``--source picamera``."""
    if seen:
        return []
    if not has_tool:
        mend = "sudo apt install -y rpicam-apps-lite && rpicam-hello --list-cameras"
        why = "there is no rpicam-hello that could list the cameras on ribbon cables"
        return [Finding("camera picamera", "error", "cannot be looked for", why, mend)]
    why = "--camera asks for one on a ribbon cable"
    mend = "rpicam-hello --list-cameras"
    return [Finding("camera picamera", "error", "none found", why, mend)]
