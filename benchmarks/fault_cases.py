"""Faults around the run: cameras, disks, the broker; each function is one."""

from __future__ import annotations

import json
import os
import shutil
import time

import cv2
import fault_world as world
from fault_kit import App, until
from fault_trial import RETRYING, Trial, fault

# Cameras


@fault("camera-lost")
def camera_lost(at: Trial) -> None:
    """MJPEG camera loses its power, and is back after 4 s."""
    app = at.run()
    with app.fault(flows=False, undo=at.camera.revive):
        at.camera.die()
        app.shows("source_state", RETRYING)
    app.shows("source_state", "^running$")
    app.shows("events.source", "running", note=False)


@fault("camera-silent")
def camera_silent(at: Trial) -> None:
    """Camera keeps its connection open and sends nothing for 8 s."""
    app = at.run()
    with app.fault(flows=False, lasts_s=8, undo=at.camera.mend):
        at.camera.mode = "silent"
        app.shows("source_state", RETRYING)
    app.shows("source_state", "^running$", note=False)


@fault("camera-garbage")
def camera_garbage(at: Trial) -> None:
    """Camera sends noise in place of JPEGs for 5 s."""
    app = at.run()
    with app.fault(flows=False, lasts_s=5, undo=at.camera.mend):
        at.camera.mode = "garbage"
        app.shows("source_state", RETRYING)
    app.shows("source_state", "^running$", note=False)


@fault("camera-mixed")
def camera_mixed(at: Trial) -> None:
    """Three of four JPEGs are noise."""
    app = at.run()
    with app.fault(flows=True, undo=at.camera.mend):
        at.camera.mode = "mixed"


@fault("camera-truncated")
def camera_truncated(at: Trial) -> None:
    """Every JPEG is cut off in its middle."""
    app = at.run()
    with app.fault(flows=True, undo=at.camera.mend):
        at.camera.mode = "truncated"


@fault("camera-size")
def camera_size(at: Trial) -> None:
    """Pictures change from 640x480 to 320x240 and back, while a video is written."""
    video = at.folder / "video.mp4"
    app = at.run("--video", video, "--recordings", at.folder / "recordings")
    app.ask("POST", "/api/recording", {"on": True})
    app.mark()
    with app.fault(flows=True, undo=at.camera.mend):
        at.camera.mode = "small"
    time.sleep(1)
    app.ask("POST", "/api/recording", {"on": False})
    found = app.ask("GET", "/api/recordings")[1]["recordings"]
    app.must(found and found[0]["seconds"] > 3, f"no whole recording: {found}")
    at.finish()
    capture = cv2.VideoCapture(os.fspath(video))
    app.must(capture.read()[0], "the video cannot be played")


@fault("camera-absent")
def camera_absent(at: Trial) -> None:
    """Camera refuses at the start, which needs it: ends with one line, and can be started again."""
    camera = at.camera = world.Camera("refusing")
    at.later(camera.die)
    app = at.app = App(at.folder, ("--source", camera.url), "", False, None)
    at.later(app.close)
    until(lambda: not app.alive, 30)
    app.must(app.process.poll() == 2, f"expected exit code 2, found {app.process.poll()}")
    lines = app.errors.strip().splitlines()
    app.must(len(lines) == 1 and "expected a video stream" in lines[0], f"said {lines}")
    first, code = lines[-1:], app.process.poll()
    app.close()
    camera.mode = "good"
    began = time.monotonic()
    again = at.run("--source", camera.url)
    again.back_s = round(time.monotonic() - began, 2)
    again.said = [f"exit code {code}: {first}"]
    again.problems += app.problems


@fault("rtsp-killed")
def rtsp_killed(at: Trial) -> None:
    """RTSP server is killed, and started again after 7 s."""
    server = at.program(world.rtsp_server())
    app = at.run("--source", f"rtsp://127.0.0.1:{server.port}/ball")
    with app.fault(flows=False, lasts_s=7, undo=server.start):
        server.kill()
        app.shows("source_state", RETRYING)
    app.shows("source_state", "^running$", note=False)


# Disks


@fault("disk-full-jsonl")
def disk_full_jsonl(at: Trial) -> None:
    """Disk of --jsonl is full (exit code 2: the file cannot be finished)."""
    disk = at.disk(16)
    app = at.run("--jsonl", disk.folder / "a.jsonl")
    with app.fault(flows=True):
        disk.fill(app.pid)
        app.shows("warnings", "cannot write .*a.jsonl")
        app.shows("events.sink", "cannot write", note=False)
    disk.clear(app.pid)
    at.code, at.last_words = 2, "cannot write .*a.jsonl"


@fault("disk-full-video")
def disk_full_video(at: Trial) -> None:
    """Disk of --video is full (exit code 2: the file cannot be finished)."""
    disk = at.disk(64)
    app = at.run("--video", disk.folder / "a.mp4")
    with app.fault(flows=True, lasts_s=6):
        disk.fill(app.pid)
        app.shows("warnings", "a.mp4: expected", 20)
        app.shows("events.sink", "a.mp4", note=False)
    disk.clear(app.pid)
    at.code, at.last_words = 2, "a.mp4"


@fault("disk-full-events")
def disk_full_events(at: Trial) -> None:
    """Disk of the event log is full for a while; no line is lost."""
    disk = at.disk(16)
    log = disk.folder / "events.jsonl"
    app = at.run("--events", log, "--models", at.models())
    (at.folder / "models" / "bad.onnx").write_bytes(b"bad")

    def happens() -> None:
        app.ask("POST", "/api/model", {"name": "bad.onnx"})
        time.sleep(1)

    happens()
    with app.fault(flows=True):
        disk.fill(app.pid, line_by_line=log)
        happens()
        app.shows("warnings", "events cannot be written")
        happens()
        disk.clear(app.pid)
    until(lambda: not app.figures["warnings"], 10)
    app.must(not app.figures["warnings"], "the warning stays")
    told = app.ask("GET", "/api/events")[1]["latest"]
    lines = lambda: [line for line in log.read_text().splitlines() if line.strip()]  # noqa: E731
    until(lambda: len(lines()) >= told, 10)
    numbers = [json.loads(line)["number"] for line in lines()]
    app.must(numbers == [*range(1, told + 1)], f"expected lines 1 to {told}, found {numbers}")


@fault("disk-full-recording")
def disk_full_recording(at: Trial) -> None:
    """Disk of the recordings is nearly full while one grows."""
    disk = at.disk(400)
    app = at.run("--recordings", disk.folder / "recordings")
    app.ask("POST", "/api/recording", {"on": True})
    time.sleep(2)
    with app.fault(flows=True):
        disk.fill(app.pid, leave=20 << 20)
        app.shows("recording.error", "expected 200 MB free" if disk.real else "cannot write")
        app.shows("recording.on", "False", note=False)
    disk.clear(app.pid)
    found = app.ask("GET", "/api/recordings")[1]["recordings"]
    app.must(found and found[0]["seconds"], f"what was recorded is lost: {found}")
    app.must(app.ask("POST", "/api/recording", {"on": True})[0] == 200, "no further recording")
    app.ask("POST", "/api/recording", {"on": False})


@fault("recordings-removed")
def recordings_removed(at: Trial) -> None:
    """Folder of the recordings is removed while one grows."""
    folder = at.folder / "recordings"
    app = at.run("--recordings", folder)
    app.ask("POST", "/api/recording", {"on": True})
    time.sleep(1)
    with app.fault(flows=True):
        shutil.rmtree(folder)
        app.shows("recording.error", "cannot write")
        app.shows("recording.on", "False", note=False)
    app.must(app.ask("POST", "/api/recording", {"on": True})[0] == 200, "no further recording")
    time.sleep(1)
    app.ask("POST", "/api/recording", {"on": False})
    app.must(app.ask("GET", "/api/recordings")[1]["recordings"], "no further recording is kept")


@fault("disk-full-output")
def disk_full_output(at: Trial) -> None:
    """Disk of the log that standard output goes to is full; camera is lost."""
    disk = at.disk(16)
    output = disk.folder / "out.txt"
    app = at.run(output=output)
    disk.fill(app.pid, line_by_line=output)
    with app.fault(flows=False, undo=at.camera.revive):
        at.camera.die()
        app.shows("source_state", RETRYING)
    disk.clear(app.pid)


# MQTT


def with_broker(at: Trial, *, start: bool = True, inject: str = "") -> tuple[App, world.Program]:
    """Starts a broker and a run that talks to it."""
    broker = at.program(world.broker(at.folder), start=start)
    app = at.run("--mqtt", f"mqtt://127.0.0.1:{broker.port}/cam", inject=inject)
    if start:
        app.shows("mqtt", "^connected$", note=False)
        app.mark()
    return app, broker


@fault("broker-killed")
def broker_killed(at: Trial) -> None:
    """MQTT broker is killed, and started again after 4 s."""
    app, broker = with_broker(at)
    with app.fault(flows=True, undo=broker.start):
        broker.kill()
        app.shows("mqtt", RETRYING)
    app.shows("mqtt", "^connected$")


@fault("broker-stalled")
def broker_stalled(at: Trial) -> None:
    """MQTT broker answers nothing for 12 s (keep-alive of 3 s instead of 15 s)."""
    app, broker = with_broker(at, inject="short-keepalive")
    with app.fault(flows=True, lasts_s=12, undo=broker.resume):
        broker.stall()
        app.shows("mqtt", RETRYING)
    app.shows("mqtt", "^connected$", 20)


@fault("broker-absent")
def broker_absent(at: Trial) -> None:
    """MQTT broker is not there at the start, and comes."""
    app, broker = with_broker(at, start=False)
    with app.fault(flows=True, lasts_s=2):
        app.shows("mqtt", RETRYING)
    broker.start()
    app.shows("mqtt", "^connected$", 20)


@fault("broker-junk")
def broker_junk(at: Trial) -> None:
    """What listens at the broker's address talks no MQTT."""
    camera = world.Camera("garbage")
    at.later(camera.die)
    app = at.run("--mqtt", f"mqtt://127.0.0.1:{camera.port}/cam")
    with app.fault(flows=True, lasts_s=6):
        app.shows("mqtt", "^retrying: (?!connecting)")
