"""Recording: real JPEGs in, real files read back."""

from __future__ import annotations

import base64
import os
import runpy
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app import recording, recordings_folder
from edgesight.device_app.live import LiveView
from edgesight.device_app.recording import Recorder, Take, Waiting
from edgesight.device_app.recordings_folder import RecordingsFolder, VideoFile
from edgesight.models.errors import InputError, OutputError
from playwright.sync_api import sync_playwright

until = runpy.run_path(str(Path(__file__).with_name("loop_kit.py")))["until"]
process = runpy.run_path(str(Path(__file__).with_name("app_kit.py")))["process"]
OLD = "edgesight-20240101-000000.mkv"
CHILD = """
import sys, time, resource, cv2, numpy as np
from pathlib import Path
from edgesight.device_app.live import LiveView
from edgesight.device_app.recording import Recorder
live = LiveView()
recorder = Recorder(live, Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
print(recorder.start(), flush=True)
for i in range(6000):
    noise = np.random.default_rng(i).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    live.publish(cv2.imencode(".jpg", noise)[1].tobytes(), i)
    time.sleep(0.01)
    if not recorder.state()["on"]:
        break
print(recorder.state()["error"], [event.text for event in live.events.after()], sep="\\n")
"""


def jpeg(grey: int, size_wh: tuple[int, int] = (64, 48)) -> bytes:
    return cv2.imencode(".jpg", np.full((*size_wh[::-1], 3), grey, np.uint8))[1].tobytes()


def noise(width: int, height: int) -> bytes:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", picture)[1].tobytes()


def played(path: Path) -> tuple[list[int], list[int]]:
    """Returns the grey at one point, and the time in ms, of every picture that a player shows."""
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    greys, times = [], []
    while True:
        ok, picture = video.read()
        if not ok:
            return greys, times
        greys.append(int(picture[24, 32, 0]))
        times.append(round(video.get(cv2.CAP_PROP_POS_MSEC)))


def near(found: list[int], expected: list[int]) -> bool:
    return len(found) == len(expected) and np.allclose(found, expected, atol=4)


class Studio:
    def __init__(self, folder: Path) -> None:
        self.live, self.folder, self.sequence = LiveView(), folder, 0
        self.made: list[Recorder] = []

    def recorder(self, **options: Any) -> Recorder:
        self.made.append(Recorder(self.live, self.folder, **options))
        return self.made[-1]

    def show(self, *greys: int, size_wh: tuple[int, int] = (64, 48)) -> None:
        self.show_jpegs(*(jpeg(grey, size_wh) for grey in greys))

    def show_jpegs(self, *pictures: bytes) -> None:
        """Shows pictures one after the other, each when the one before has been taken."""
        shots = self.made[-1]._before.shots
        for picture in pictures:
            self.sequence += 1
            self.live.publish(picture, self.sequence)
            until(lambda picture=picture: bool(shots) and shots[-1][1] == picture)
            time.sleep(0.005)

    def texts(self) -> list[str]:
        return [event.text for event in self.live.events.after()]

    def parts(self) -> list[Path]:
        return list(self.folder.glob("*.part"))


@pytest.fixture
def studio(tmp_path: Path, no_thread_left: None) -> Iterator[Studio]:
    made = Studio(tmp_path / "recordings")
    yield made
    for recorder in made.made:
        recorder.close()
    assert made.live.viewers == 0


def test_begins_with_what_was_before_the_button(studio: Studio) -> None:
    recorder = studio.recorder()
    studio.show(10, 50, 90)
    assert not studio.folder.exists()
    name = recorder.start()
    assert (recorder.start(), recorder.list()) == (name, [])
    assert not recorder.delete(name)  # it grows
    studio.show(130, 170, 210)
    state = recorder.state()
    assert (state["on"], state["name"], state["error"]) == (True, name, None)
    assert (recorder.stop(), recorder.stop()) == (name, None)
    assert recorder.state() == {**state, "on": False, "name": None, "seconds": 0.0}
    path = studio.folder / name
    assert recorder.open_file(name) == path
    greys, times = played(path)
    assert near(greys, [10, 50, 90, 130, 170, 210, 210])
    assert times == sorted(set(times))
    told = {"name": name, "bytes": path.stat().st_size, "seconds": times[-1] / 1000}
    assert recorder.list() == [{**told, "time": pytest.approx(time.time(), abs=120)}]
    assert (recorder.delete(name), recorder.delete(name), recorder.list()) == (True, False, [])
    ended = f"ended {name}: {times[-1] / 1000:.1f} s"
    assert studio.texts() == [f"began {name}", ended, f"deleted {name}"]


def test_plays_as_long_as_it_took_though_pictures_come_irregularly(tmp_path: Path) -> None:
    folder = RecordingsFolder(tmp_path, 10**9)
    name, file = folder.create()
    now = time.monotonic()
    before = [(now - ago, jpeg(20 * i)) for i, ago in enumerate((4.0, 3.95, 3.9, 3.9, 1.2, 0.4))]
    take = Take(name, file, folder, before, 600)
    take.stop()
    stopped_s = time.monotonic()
    path = take.write()
    assert path is not None
    greys, times = played(path)
    assert times[:5] == [0, 50, 100, 2800, 3600]
    assert near(greys, [0, 20, 40, 80, 100, 100])
    assert 4000 <= times[5] <= (stopped_s - now + 4) * 1000 + 1
    assert take.seconds == times[5] / 1000 == recordings_folder.seconds_of(path)
    assert list(recordings_folder.pictures(path))[3] == (2800, before[4][1])  # as it was


def test_what_is_older_than_the_pre_roll_stays_out(studio: Studio) -> None:
    recorder = studio.recorder(pre_roll_s=0.3)
    studio.show(10)
    time.sleep(0.4)  # nobody looks: nothing comes that could push it out
    recorder.start()
    studio.show(200)
    name = recorder.stop()
    assert near(played(studio.folder / str(name))[0], [200, 200])
    until(lambda: not recorder._before.shots)  # nor does it stay in memory


def test_is_a_viewer_only_while_it_records(studio: Studio) -> None:
    recorder = studio.recorder()
    for press, viewers in ((recorder.start, 1), (recorder.stop, 0)):
        press()
        assert studio.live.viewers == viewers
    always = studio.recorder(always=True)
    assert studio.live.viewers == 1
    for _ in range(2):
        always.close()
        assert studio.live.viewers == 0
    with pytest.raises(OutputError, match="it is over"):
        always.start()


def test_without_a_picture_there_is_no_file(studio: Studio) -> None:
    recorder = studio.recorder()
    recorder.start()
    assert len(studio.parts()) == 1
    studio.live.close()  # ends it, too
    until(lambda: not recorder.state()["on"])
    assert list(studio.folder.iterdir()) == []
    assert "no picture came" in str(recorder.state()["error"])


def test_pictures_of_another_size_are_fitted_into_the_size_at_the_button(studio: Studio) -> None:
    recorder = studio.recorder()
    studio.show(20, size_wh=(32, 32))
    studio.show(60)
    recorder.start()
    studio.show(120, size_wh=(200, 48))
    studio.show(180, size_wh=(48, 200))
    path = studio.folder / str(recorder.stop())
    sizes = {recordings_folder.jpeg_size(data) for _, data in recordings_folder.pictures(path)}
    assert sizes == {(64, 48)}
    assert near(played(path)[0], [20, 60, 120, 180, 180])


def test_ends_by_itself_when_it_is_long_enough(studio: Studio) -> None:
    recorder = studio.recorder(seconds_max=1.0)
    studio.show(50)
    name = recorder.start()
    while recorder.state()["on"]:
        studio.show(60, 70)
    assert studio.texts()[-1].endswith("; it had 1 s, the longest that one may be")
    assert 1.0 <= (recorder.list()[0]["seconds"] or 0) < 1.5
    assert recorder.start() != name
    assert recorder.state()["error"] is None


def test_a_nearly_full_disk_ends_it(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CHECK_S", 0.0)
    recorder = studio.recorder()
    name = recorder.start()
    studio.show(50, 90)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=199_000_000))
    until(lambda: not recorder.state()["on"])
    assert "expected 200 MB free for a recording, found 199" in str(recorder.state()["error"])
    assert near(played(studio.folder / name)[0], [50, 90, 90])
    with pytest.raises(OutputError, match="found 199 MB"):
        recorder.start()


def test_a_failing_disk_leaves_what_was_written(tmp_path: Path) -> None:
    with process("-c", CHILD, str(tmp_path), "300000") as child:
        out, problems = child.communicate(timeout=60)
    name, error, texts = out.splitlines()
    assert problems == ""
    assert error == f"cannot write {tmp_path}: File too large; free space or choose another place"
    assert error in texts
    assert 250_000 < (tmp_path / name).stat().st_size <= 300_000  # the last whole picture's end
    assert len(played(tmp_path / name)[0]) > 10


def test_an_unwritable_folder_is_told(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    studio.folder = tmp_path / "file" / "recordings"
    recorder = studio.recorder()
    with pytest.raises(OutputError, match=r"cannot write .*recordings: Not a directory; f") as told:
        recorder.start()
    assert recorder.state() == {**recorder.state(), "on": False, "error": str(told.value)}
    assert (recorder.list(), studio.live.viewers) == ([], 0)


def test_what_a_killed_run_left_is_mended(studio: Studio) -> None:
    with process("-c", CHILD, str(studio.folder), "-1") as child:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        part = studio.folder / f"{name}.part"
        until(lambda: part.stat().st_size > 300_000)
        studio.recorder().close()  # another run in the same folder leaves it alone
        assert part.exists()
        child.send_signal(signal.SIGKILL)
        child.wait()
    os.truncate(part, part.stat().st_size - 100)  # in the middle of a picture
    (studio.folder / f"{OLD}.part").write_bytes(b"\x1a\x45\xdf\xa3")
    recorder = studio.recorder()
    until(lambda: studio.parts() == [])
    times = played(studio.folder / name)[1]
    assert [(e["name"], e["seconds"]) for e in recorder.list()] == [(name, times[10:][-1] / 1000)]
    mended = f"mended {name}: {times[-1] / 1000:.1f} s"
    until(lambda: studio.texts() == [f"removed {OLD}.part: nothing in it can be played", mended])
    data = (studio.folder / name).read_bytes()  # it ends with the index, by which players jump
    assert data[-13:-8] == b"\xf1\x10\0\0\x08"
    place = data.index(b"\x18\x53\x80\x67") + 12 + int.from_bytes(data[-8:], "big")
    assert data[place : place + 4] == b"\x1f\x43\xb6\x75"


def test_a_recording_is_not_mended_over_another(studio: Studio) -> None:
    studio.folder.mkdir()
    with (studio.folder / f"{OLD}.part").open("x+b", buffering=0) as file:
        VideoFile(file, recordings_folder.MJPEG, (64, 48)).add(0, jpeg(50))
    (studio.folder / OLD).write_bytes(b"mine")
    recorder = studio.recorder()
    until(lambda: "File exists; remove it" in str(recorder.state()["error"]))
    assert (studio.folder / OLD).read_bytes() == b"mine"


def test_the_oldest_go_first_and_nothing_else_does(studio: Studio) -> None:
    studio.folder.mkdir()
    ours = [OLD, "edgesight-20240101-000000-2.mkv", "edgesight-20240101-000001.webm"]
    others = ["holiday.mkv", "edgesight-20230101-000000.mkv.txt", "xedgesight-20230101-000000.mkv",
              "edgesight-20231301-000000.mkv", "edgesight-20230101-000000.mp4"]  # fmt: skip
    for other in ours + others:
        (studio.folder / other).write_bytes(bytes(400_000))
    recorder = studio.recorder(bytes_max_total=1_000_000)
    assert [entry["name"] for entry in recorder.list()] == ours[::-1]
    recorder.start()
    picture = noise(400, 300)
    studio.show_jpegs(picture)
    name = recorder.stop()
    assert [entry["name"] for entry in recorder.list()] == [name, ours[2]]
    assert {path.name for path in studio.folder.iterdir()} == {str(name), ours[2], *others}
    assert [text.split(":")[0][8:] for text in studio.texts()[1:3]] == ours[:2]
    recorder.start()
    while recorder.state()["on"]:
        studio.show_jpegs(picture)  # until it alone is longer than all may be
    assert "expected at most 1 MB of recordings" in str(recorder.state()["error"])


@pytest.mark.parametrize("name", [
    "../secret.mkv", f"../{OLD}", f"%2e%2e/{OLD}", f"{OLD}\0", f"{OLD}\n", f"/{OLD}", "", ".", "..",
    f"./{OLD}", f"x/../{OLD}", OLD.upper(), OLD.replace("2", "\u0662"), "edgesight-1.mkv",
    "edgesight-20240102-000000.mkv", "edgesight-20240103-000000.mkv", f"{OLD}.part",
])  # fmt: skip
def test_no_other_name_reaches_a_file(studio: Studio, name: str) -> None:
    studio.folder.mkdir()
    for secret in (OLD, f"../{OLD}", f"{OLD}.part", "../secret.mkv"):
        (studio.folder / secret).write_bytes(b"secret")
    (studio.folder / "edgesight-20240102-000000.mkv").symlink_to(studio.folder.parent / OLD)
    (studio.folder / "edgesight-20240103-000000.mkv").mkdir()
    folder = RecordingsFolder(studio.folder, 10**9)
    before = sorted(studio.folder.parent.rglob("*"))
    for given in (name, str(studio.folder / OLD)):
        assert (folder.open_file(given), folder.delete(given)) == (None, False)
    assert sorted(studio.folder.parent.rglob("*")) == before
    assert [entry["name"] for entry in folder.entries()] == [OLD]


def test_what_waits_is_bounded_in_bytes_and_in_seconds(studio: Studio) -> None:
    waiting = Waiting(5.0)
    for i in range(2000):  # 20 seconds of 100 pictures a second
        waiting.add((i / 100, b"x"))
    assert [time_s for time_s, _ in (waiting.shots[0], waiting.shots[-1])] == [14.99, 19.99]
    recorder = studio.recorder(pre_roll_s=3600)
    picture, sequence = bytes(1 << 20), 0
    while recorder._before.lost < 10:  # as fast as they can be published
        sequence += 1
        studio.live.publish(picture, sequence)
        assert len(recorder._before.shots) <= 33
        time.sleep(0)
    until(lambda: recorder._before._bytes == 32 << 20)


def test_a_disk_that_hangs_holds_up_nobody_and_loses_nothing(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, go_on, real = threading.Event(), threading.Event(), VideoFile.add

    def add(self: VideoFile, time_ms: int, picture: bytes) -> None:
        hangs.set()
        assert go_on.wait(60)
        real(self, time_ms, picture)

    monkeypatch.setattr(VideoFile, "add", add)
    recorder = studio.recorder()
    name = recorder.start()
    studio.show(10)
    assert hangs.wait(60)
    studio.show(50, 90, 130)
    (stopping := threading.Thread(target=recorder.stop)).start()
    until(lambda: recorder._take is not None and recorder._take.stopped)
    studio.show(170)  # after the button
    assert (recorder.state()["name"], recorder.list()) == (name, [])
    go_on.set()
    stopping.join(60)
    assert near(played(studio.folder / name)[0], [10, 50, 90, 130, 130])
    assert recorder.state()["error"] is None


def test_numbers_out_of_range_are_refused(studio: Studio) -> None:
    for name, value in (("pre_roll_s", -1), ("pre_roll_s", float("nan")), ("seconds_max", 0)):
        with pytest.raises(InputError, match=rf"{name}: expected .* or more, found {value}"):
            studio.recorder(**{name: value})


def test_webm_plays_in_a_browser(studio: Studio) -> None:
    recorder = studio.recorder(webm=True)
    for i in range(20):
        studio.show(10 * i + 20, size_wh=(161, 121))
        time.sleep(0.05)
    name = recorder.start().replace(".mkv", ".webm")
    recorder.stop()
    until(lambda: [entry["name"] for entry in recorder.list()] == [name])
    greys, times = played(studio.folder / name)
    assert near(greys, [*range(20, 220, 10), 210])
    data = base64.b64encode((studio.folder / name).read_bytes()).decode()
    with sync_playwright() as playwright:
        binary = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(f"<video muted src='data:video/webm;base64,{data}'></video>")
        page.evaluate("{ const v = document.querySelector('video'); window.v = v; v.play(); }")
        page.wait_for_function("v.ended && v.readyState >= 2", timeout=60_000)
        shown = page.evaluate("[v.videoWidth, v.videoHeight, v.currentTime, v.duration]")
        page.evaluate("v.currentTime = 0.5")
        page.wait_for_function("!v.seeking && v.currentTime < 0.6", timeout=60_000)
        browser.close()
    assert shown == [161, 121, *[pytest.approx(times[-1] / 1000, abs=0.05)] * 2]


def test_webm_is_given_up_when_the_run_ends(studio: Studio) -> None:
    recorder = studio.recorder(webm=True)
    studio.show_jpegs(*[noise(1280, 960)] * 5)
    name = recorder.start()
    recorder.close()
    assert [entry["name"] for entry in recorder.list()] == [name]
    assert studio.parts() == []
