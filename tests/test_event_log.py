"""The file of events: followed as it grows, rotated, and alive after whatever happens to it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edgesight.device_app import event_log
from edgesight.device_app.event_log import EventLog
from edgesight.device_app.events import WAITING_MAX, Events
from edgesight.models.errors import OutputError

GUARD_S = 60
FULL = Path("/dev/full")
pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "RETRY_S", 0.02)
    monkeypatch.setattr(event_log, "QUIET_S", 0.01)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def log(path: Path, events: Events) -> Iterator[EventLog]:
    log = EventLog(path, events)
    yield log
    log.close()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[str]:
    try:
        return [row["text"] for row in rows(path)]
    except FileNotFoundError:  # it may be on the move
        return []


def told(events: Events) -> list[str]:
    return [event.text for event in events.after() if event.kind == "sink"]


def fill_the_disk(path: Path) -> None:
    """From now on every write to the path says that no space is left, as a full disk does."""
    link = path.with_name("link")
    link.symlink_to(FULL)
    link.replace(path)


def test_each_event_is_a_line_at_once(path: Path, events: Events, log: EventLog) -> None:
    given = events.add("enter", "a person came\ninto Tür", zone="Tür", track=3)
    until(lambda: texts(path))
    (line,) = path.read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n")
    assert json.loads(line) == given.to_dict()
    assert json.loads(line)["data"] == {"zone": "Tür", "track": 3}
    time.sleep(0.1)  # nothing happens for many times QUIET_S
    events.add("leave", "away")
    until(lambda: len(texts(path)) == 2)
    assert log.error is None


def test_close_writes_what_waits_and_may_be_called_twice(path: Path, events: Events) -> None:
    log = EventLog(path, events)
    for i in range(500):
        events.add("enter", str(i))
    log.close()
    log.close()
    assert texts(path) == [str(i) for i in range(500)]
    events.add("enter", "too late")
    assert len(texts(path)) == 500


def test_an_earlier_file_is_continued_in_a_line_of_its_own(path: Path, events: Events) -> None:
    path.write_bytes(b'{"text": "before"}\n{"text": "half a li')
    log = EventLog(path, events)
    events.add("enter", "after")
    log.close()
    first, half, last = path.read_text().splitlines()
    assert json.loads(first)["text"] == "before"
    assert half == '{"text": "half a li'
    assert json.loads(last)["text"] == "after"


def test_it_is_rotated_by_size_and_tail_follows_it(path: Path, events: Events) -> None:
    tail = subprocess.Popen(
        ["tail", "-F", "-n", "+1", "-s", "0.01", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    followed: list[bytes] = []
    assert tail.stdout is not None
    reader = threading.Thread(target=lambda: followed.extend(tail.stdout))  # type: ignore[arg-type]
    reader.start()
    log = EventLog(path, events, bytes_max=2000, files=3)
    try:
        for i in range(100):
            events.add("enter", str(i), filling="x" * 100)
            # tail looks at files one after the other: it must have seen one before the next comes
            until(lambda i=i: len(followed) == i + 1)
    finally:
        log.close()
        tail.kill()
        reader.join(GUARD_S)
        tail.wait()
        tail.stdout.close()
    assert [json.loads(line)["text"] for line in followed] == [str(i) for i in range(100)]
    kept = [path, *(Path(f"{path}.{i}") for i in (1, 2, 3))]
    assert sorted(path.parent.iterdir()) == sorted(kept)
    assert all(0 < file.stat().st_size <= 2000 for file in kept)
    left = [text for file in reversed(kept) for text in texts(file)]
    assert left == [str(i) for i in range(100 - len(left), 100)], "the oldest went, nothing else"
    assert len(left) > 30


def test_a_line_longer_than_a_file_may_be_is_written(path: Path, events: Events) -> None:
    log = EventLog(path, events, bytes_max=300, files=2)
    for text in ("a", "b" * 1000, "c"):
        events.add("enter", text)
    log.close()
    assert [texts(p) for p in (Path(f"{path}.2"), Path(f"{path}.1"), path)] == [
        ["a"],
        ["b" * 1000],
        ["c"],
    ]


def test_what_cannot_be_rotated_grows_and_keeps_its_older_ones(path: Path, events: Events) -> None:
    blocked = Path(f"{path}.2")
    (blocked / "in the way").mkdir(parents=True)
    Path(f"{path}.1").write_text('{"text": "older"}\n')
    Path(f"{path}.3").write_text('{"text": "oldest"}\n')
    log = EventLog(path, events, bytes_max=300, files=3)
    for i in range(20):
        events.add("enter", str(i))
    until(lambda: len(told(events)) == 1 and len(texts(path)) == 21)
    assert "cannot be rotated" in str(log.error)
    assert texts(Path(f"{path}.1")) == ["older"]
    (blocked / "in the way").rmdir()
    blocked.rmdir()
    events.add("enter", "last")
    until(lambda: log.error is None and texts(path) == ["last"])
    log.close()
    assert texts(blocked) == ["older"]
    assert len(texts(Path(f"{path}.1"))) == 21
    assert len(told(events)) == 1


def test_a_full_disk_is_told_once_and_nothing_is_lost(
    path: Path, events: Events, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "TELL_S", 0.0)
    events.add("enter", "before")
    until(lambda: texts(path) == ["before"])
    path.rename(path.with_name("moved"))
    fill_the_disk(path)
    for i in range(50):
        events.add("enter", str(i))
    until(lambda: told(events))
    assert "No space left on device" in str(log.error)
    assert "No space left on device" in told(events)[0]
    number = events.after()[-1].number
    time.sleep(0.3)  # a dozen further attempts
    assert events.after()[-1].number == number, "attempts are not told"
    path.unlink()
    until(lambda: len(texts(path)) == 51)
    lines = texts(path)
    lines.remove(told(events)[0])  # the log itself says why it stopped, somewhere among them
    assert lines == [str(i) for i in range(50)]
    assert log.error is None
    assert len(told(events)) == 1


def test_a_disk_that_fails_again_and_again_feeds_no_circle(
    path: Path, events: Events, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        path.unlink()
        fill_the_disk(path)
        events.add("enter", f"bad {i}")
        until(lambda: log.error)
        path.unlink()
        until(lambda i=i: f"bad {i}" in texts(path) and log.error is None)
    assert len(told(events)) == 1
    monkeypatch.setattr(event_log, "TELL_S", 0.0)
    path.unlink()
    fill_the_disk(path)
    events.add("enter", "bad, much later")
    until(lambda: len(told(events)) == 2)


def test_a_failure_that_comes_too_soon_to_be_told_is_told_if_it_stays(
    path: Path, events: Events, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bad in ("first", "second"):
        path.unlink()
        fill_the_disk(path)
        events.add("enter", bad)
        until(lambda: log.error)
        if bad == "first":
            until(lambda: told(events))
            path.unlink()
            until(lambda: log.error is None and texts(path))
    assert len(told(events)) == 1
    monkeypatch.setattr(event_log, "TELL_S", 0.0)
    until(lambda: len(told(events)) == 2)


@pytest.mark.parametrize("moved", [False, True])
def test_half_a_line_is_finished_when_there_is_room(
    path: Path, events: Events, log: EventLog, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    real, room = os.write, [10]

    def write(handle: int, data: bytes) -> int:
        """Has room for ten bytes, as a disk that gets full within a line."""
        if handle != log._handle:
            return real(handle, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        done = real(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    events.add("enter", "cut")
    until(lambda: log.error)
    assert path.stat().st_size == 10
    if moved:  # then the new file gets all of it
        path.rename(path.with_name("old"))
    room[0] = 100_000
    until(lambda: log.error is None)
    log.close()
    assert texts(path)[0] == "cut"
    assert len(rows(path)) == 2, "and the line that tells of it"


def test_the_file_may_be_deleted_or_moved(path: Path, events: Events, log: EventLog) -> None:
    for text, away in (
        ("deleted", path.unlink),
        ("moved", lambda: path.rename(path.with_name("old"))),
    ):
        away()
        events.add("enter", text)
        until(lambda text=text: texts(path) == [text])
    assert texts(path.with_name("old")) == ["deleted"]
    assert told(events) == []


def test_the_folder_may_go_and_is_not_made_again(tmp_path: Path, events: Events) -> None:
    path = tmp_path / "disk" / "events.jsonl"
    path.parent.mkdir()
    log = EventLog(path, events)
    path.unlink()
    path.parent.rmdir()
    events.add("enter", "meanwhile")
    until(lambda: told(events))
    assert not path.parent.exists()
    path.parent.mkdir()
    until(lambda: "meanwhile" in texts(path))
    log.close()


def test_close_does_not_wait_for_a_full_disk(path: Path, events: Events, log: EventLog) -> None:
    path.unlink()
    fill_the_disk(path)
    events.add("enter", "lost")
    until(lambda: log.error)
    log.close()
    assert not log._thread.is_alive()
    assert "No space left" in str(log.error), "it can still be told after the run"


def test_what_is_too_much_to_wait_is_counted(path: Path, events: Events, log: EventLog) -> None:
    path.unlink()
    fill_the_disk(path)
    for i in range(WAITING_MAX + 50):
        events.add("enter", str(i))
    until(lambda: log.error is not None)
    assert 40 <= log.missed <= 60
    path.unlink()
    until(lambda: len(texts(path)) >= WAITING_MAX)


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}, threading.Lock()])
def test_data_that_is_nothing_for_json_costs_the_data_alone(
    path: Path, events: Events, log: EventLog, bad: Any
) -> None:
    events.add("model", "odd \udc80", value=bad)
    events.add("model", "next")
    until(lambda: texts(path) == ["odd \udc80", "next"])
    assert rows(path)[0]["data"] == {}
    assert rows(path)[0]["kind"] == "model"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "found a folder"),
        ("missing/events.jsonl", "No such file or directory; create its folder"),
        ("file/events.jsonl", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("nul\0.jsonl", "null"),
        ("full", "found a device"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, events: Events, name: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").symlink_to(FULL)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match=words) as caught:
        EventLog(tmp_path / name, events)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
