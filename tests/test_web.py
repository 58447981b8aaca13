"""The web server, asked by real HTTP clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from edgesight.device_app.live import LiveView
from edgesight.device_app.web.server import Server, start_server
from edgesight.models.errors import OutputError


def jpeg(shade: int) -> bytes:
    done, data = cv2.imencode(".jpg", np.full((32, 48, 3), shade, np.uint8))
    assert done
    return data.tobytes()


@pytest.fixture
def live() -> Iterator[LiveView]:
    """A view that gets a picture every 20 ms."""
    view = LiveView()
    view.set_figures({"model": "m", "frames": 3})
    ending = threading.Event()

    def feed() -> None:
        for sequence in range(100_000):
            if ending.wait(0.02):
                return
            view.publish(jpeg(sequence % 250), sequence)

    thread = threading.Thread(target=feed)
    thread.start()
    yield view
    ending.set()
    view.close()
    thread.join()


@pytest.fixture
def server(live: LiveView) -> Iterator[Server]:
    running = start_server(live, "127.0.0.1", 0)
    yield running
    live.close()
    running.stop()


def port_of(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1].strip("/"))


def ask(
    server: Server, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=10)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    link.request(method, path, data, headers or {})
    answer = link.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    link.close()
    return found


def wait_for(condition: Any, what: str) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def open_stream(server: Server) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    link = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=10)
    link.request("GET", "/stream")
    return link, link.getresponse()


def read_picture(answer: http.client.HTTPResponse) -> np.ndarray[Any, Any]:
    length = None
    while line := answer.readline().strip() if length is None else b"":
        if line.lower().startswith(b"content-length"):
            length = int(line.split(b":")[1])
    if length is None:
        return read_picture(answer)
    answer.readline()
    picture = cv2.imdecode(np.frombuffer(answer.read(length), np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    answer.readline()
    return np.asarray(picture)


def test_page_is_whole_and_brings_nothing_from_elsewhere(server: Server) -> None:
    for path in ("/", "/page.css", "/page.js"):
        status, headers, body = ask(server, "GET", path)
        assert status == 200
        assert b"http://" not in body
        assert b"https://" not in body
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_stream_gives_newer_and_newer_pictures(server: Server, live: LiveView) -> None:
    link, answer = open_stream(server)
    assert answer.getheader("content-type", "").startswith("multipart/x-mixed-replace")
    shades = [int(read_picture(answer)[5, 5, 0]) for _ in range(4)]
    assert shades == sorted(shades)
    assert shades[-1] > shades[0]
    link.close()


def test_viewers_are_counted_in_and_out(server: Server, live: LiveView) -> None:
    assert live.viewers == 0
    links = [open_stream(server) for _ in range(2)]
    for _, answer in links:
        read_picture(answer)
    assert live.viewers == 2
    for link, answer in links:
        answer.close()
        link.close()
    wait_for(lambda: live.viewers == 0, "viewers that went are still counted")


def test_a_viewer_that_does_not_read_holds_up_nobody(server: Server) -> None:
    stuck = socket.create_connection(("127.0.0.1", port_of(server)))
    stuck.sendall(b"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port_of(server))
    link, answer = open_stream(server)
    for _ in range(20):
        read_picture(answer)
    assert ask(server, "GET", "/api/figures")[0] == 200
    link.close()
    stuck.close()


def noise(number: int) -> bytes:
    """Returns a picture of about 300 kB that ends with its number."""
    pixels = np.random.default_rng(number % 7).integers(0, 255, (400, 640, 3), np.uint8)
    data: bytes = cv2.imencode(".jpg", pixels)[1].tobytes()
    return data[:-2] + b"#%08d" % number + data[-2:]


def test_a_slow_viewer_sees_new_pictures_and_not_a_queue_of_old_ones() -> None:
    live = LiveView()
    running = start_server(live, "127.0.0.1", 0)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    slow.connect(("127.0.0.1", port_of(running)))
    slow.settimeout(10)
    slow.sendall(b"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port_of(running))
    pictures = [noise(number) for number in range(60)]
    for number, picture in enumerate(pictures):
        live.publish(picture, number)
        time.sleep(0.02)
    found, until = b"", time.monotonic() + 20
    while b"#%08d" % 59 not in found and time.monotonic() < until:
        found += slow.recv(65536)
    numbers = [int(part[:8]) for part in found.split(b"#")[1:] if part[:8].isdigit()]
    slow.close()
    live.close()
    running.stop()
    assert numbers[-1] == 59
    assert len(numbers) <= 5, f"{len(numbers)} of 60 pictures were queued for a viewer that slept"


def test_a_viewer_that_takes_nothing_is_let_go(live: LiveView) -> None:
    running = start_server(live, "127.0.0.1", 0, stall_s=0.5)
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.connect(("127.0.0.1", port_of(running)))
    stuck.sendall(b"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port_of(running))
    wait_for(lambda: live.viewers == 1, "the viewer is not counted")
    big = noise(0)
    ending = time.monotonic() + 10
    sequence = 1_000_000
    while live.viewers and time.monotonic() < ending:
        sequence += 1
        live.publish(big, sequence)
        time.sleep(0.02)
    assert live.viewers == 0
    stuck.close()
    running.stop()


def test_many_viewers_of_a_silent_source_delay_nobody() -> None:
    live = LiveView()
    running = start_server(live, "127.0.0.1", 0)
    links = [open_stream(running) for _ in range(60)]
    slowest_s = 0.0
    for _ in range(10):
        began = time.monotonic()
        assert ask(running, "GET", "/api/figures")[0] == 200
        slowest_s = max(slowest_s, time.monotonic() - began)
    assert live.viewers == 60
    assert slowest_s < 0.4
    for link, answer in links:
        answer.close()
        link.close()
    wait_for(lambda: live.viewers == 0, "viewers that went are still counted")
    live.close()
    running.stop()


def test_snapshot_is_of_now_and_not_of_the_last_viewer() -> None:
    live = LiveView()
    running = start_server(live, "127.0.0.1", 0)
    live.publish(jpeg(10), 1)  # from long ago: nobody looked since, so nothing was encoded

    def encode_for_viewers() -> None:
        wait_for(lambda: live.viewers, "a snapshot is not counted as a viewer")
        live.publish(jpeg(200), 2)

    encoder = threading.Thread(target=encode_for_viewers)
    time.sleep(0.2)
    encoder.start()
    _, _, body = ask(running, "GET", "/snapshot.jpg")
    encoder.join()
    shade = int(cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)[5, 5, 0])
    live.close()
    running.stop()
    assert abs(shade - 200) < 5


def test_figures_that_are_no_numbers_become_null(server: Server, live: LiveView) -> None:
    live.set_figures(
        {
            "inference_fps": float("nan"),
            "stages_ms": {"draw": {"p50": float("inf"), "p90": 1.0, "p99": 1.0}},
        }
    )
    status, _, body = ask(server, "GET", "/api/figures")
    assert status == 200
    assert json.loads(body)["inference_fps"] is None
    assert json.loads(body)["stages_ms"]["draw"]["p50"] is None


def test_a_picture_is_whole_before_the_next_one_comes() -> None:
    live = LiveView()
    running = start_server(live, "127.0.0.1", 0)
    live.publish(jpeg(10), 1)
    viewer = socket.create_connection(("127.0.0.1", port_of(running)), timeout=5)
    viewer.sendall(b"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port_of(running))
    found = b""
    while found.count(b"--frame\r\n") < 2:  # an old browser shows a part once its end is there
        found += viewer.recv(4096)
    assert found.index(jpeg(10)) < found.rindex(b"--frame\r\n")
    viewer.close()
    live.close()
    running.stop()


def test_the_end_of_the_run_ends_the_streams(server: Server, live: LiveView) -> None:
    link, answer = open_stream(server)
    read_picture(answer)
    live.close()
    answer.read()
    wait_for(lambda: live.viewers == 0, "the stream goes on after the run")
    link.close()


def test_figures_and_snapshot(server: Server) -> None:
    status, _, body = ask(server, "GET", "/api/figures")
    assert (status, json.loads(body)["model"]) == (200, "m")
    status, headers, body = ask(server, "GET", "/snapshot.jpg")
    assert status == 200
    assert "attachment" in headers["content-disposition"]
    assert cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR) is not None


def test_controls_change_what_the_loop_reads(server: Server, live: LiveView) -> None:
    status, _, body = ask(server, "POST", "/api/controls", {"boxes": False, "score_min": 0.6})
    told = {"boxes": False, "score_min": 0.6, "classes": None, "plain": False}
    assert (status, json.loads(body)) == (200, told)
    assert (live.controls.boxes, live.controls.score_min) == (False, 0.6)


@pytest.mark.parametrize(
    "body",
    [
        {"score_min": 1.5}, {"score_min": "0.5"}, {"score_min": True}, {"boxes": 1}, {"other": 1},
        {"boxes": False, "score_min": -1}, {}, [], b"not json", b'{"score_min": NaN}', b" " * 9999,
        b"[" * 4000, b'{"score_min": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
def test_wrong_controls_change_nothing(server: Server, live: LiveView, body: Any) -> None:
    status, _, answer = ask(server, "POST", "/api/controls", body)
    assert status == 400
    assert "expected" in json.loads(answer)["error"]
    assert (live.controls.boxes, live.controls.score_min) == (True, 0.35)


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_strangers_are_refused(server: Server, live: LiveView, headers: dict[str, str]) -> None:
    assert ask(server, "POST", "/api/controls", {"boxes": False}, headers)[0] == 403
    assert ask(server, "GET", "/stream", headers=headers)[0] == 403
    assert live.controls.boxes


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("evil.example:8000", 403), ("[", 403), ("192.168.1.7:9000", 200),
        ("[fe80::1]:8000", 200), (socket.gethostname(), 200), ("localhost:8000", 200),
    ],
)  # fmt: skip
def test_beyond_loopback_only_addresses_and_own_names_are_answered(
    live: LiveView, host: str, status: int
) -> None:
    running = start_server(live, "0.0.0.0", 0)
    try:
        assert ask(running, "GET", "/", headers={"Host": host})[0] == status
    finally:
        live.close()
        running.stop()


@pytest.mark.parametrize("path", ["/server.py", "/../live.py", "/%2e%2e/live.py", "//etc/passwd"])
def test_no_request_reaches_the_disk(server: Server, path: str) -> None:
    assert ask(server, "GET", path)[0] == 404


def test_a_strange_address_is_not_called_a_port_in_use(live: LiveView) -> None:
    with pytest.raises(OutputError, match="name an address of this machine with --host"):
        start_server(live, "192.0.2.1", 0)


def test_port_in_use_is_one_clear_error(server: Server, live: LiveView) -> None:
    with pytest.raises(OutputError, match="choose another with --port"):
        start_server(live, "127.0.0.1", port_of(server))


def test_a_server_that_ends_by_itself_is_noticed(live: LiveView) -> None:
    server = start_server(live, "127.0.0.1", 0)
    assert server.alive
    server._server.should_exit = True
    wait_for(lambda: not server.alive, "nobody noticed")
    stopped = start_server(live, "127.0.0.1", 0)
    stopped.stop()
    assert stopped.alive, "that was no failure"


def test_stop_ends_open_streams(live: LiveView) -> None:
    server = start_server(live, "127.0.0.1", 0)
    _, answer = open_stream(server)
    read_picture(answer)
    live.close()
    server.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port_of(server)), timeout=5)


def test_half_a_request_is_not_waited_for_for_ever(live: LiveView) -> None:
    running = start_server(live, "127.0.0.1", 0, stall_s=0.5)
    try:
        with socket.create_connection(("127.0.0.1", port_of(running)), timeout=60) as half:
            half.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1")
            with contextlib.suppress(ConnectionResetError):
                assert half.recv(100) == b""
    finally:
        running.stop()


def test_half_a_second_request_is_not_waited_for_either(live: LiveView) -> None:
    running = start_server(live, "127.0.0.1", 0, stall_s=0.5)
    try:
        with socket.create_connection(("127.0.0.1", port_of(running)), timeout=60) as half:
            host = b"Host: 127.0.0.1:%d" % port_of(running)
            half.sendall(b"GET /api/figures HTTP/1.1\r\n" + host + b"\r\n\r\n")
            assert half.recv(10000).startswith(b"HTTP/1.1 200")
            half.sendall(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionResetError):
                while half.recv(10000):
                    pass
    finally:
        running.stop()
