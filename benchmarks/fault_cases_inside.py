"""Faults of viewers, models, the machine, and inside the run; each function is one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import fault_world as world
from edgesight.models.zoo import model_path
from fault_cases import with_broker
from fault_kit import App, until
from fault_trial import HIDDEN, Trial, fault

# The page


@fault("viewer-stalled")
def viewer_stalled(at: Trial) -> None:
    """A viewer opens the stream and never reads."""
    app = at.run()
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with app.fault(flows=True, lasts_s=2), link:
        link.connect(("127.0.0.1", app.port))
        link.sendall(f"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{app.port}\r\n\r\n".encode())
        app.shows("viewers", "^2$", note=False)
        app.shows("viewers", "^1$", 25)
        app.must(at.viewer.goes_on(), "the other viewer got nothing meanwhile")


@fault("viewers-rush")
def viewers_rush(at: Trial) -> None:
    """50 viewers come and go at once, four times, resetting their connections."""
    app = at.run()
    most = 0
    with app.fault(flows=True):
        for _ in range(4):
            links = [socket.create_connection(("127.0.0.1", app.port)) for _ in range(50)]
            for link in links:
                link.sendall(f"GET /stream HTTP/1.1\r\nHost: 127.0.0.1:{app.port}\r\n\r\n".encode())
            time.sleep(0.7)
            most = max(most, app.figures["viewers"])
            for link in links:
                world.reset(link)
    app.must(most > 25, f"expected 50 viewers at once, found {most}")
    app.shows("viewers", "^1$")


@fault("half-requests")
def half_requests(at: Trial) -> None:
    """300 clients begin a request and never end it."""
    app = at.run()
    with app.fault(flows=True), world.half_requests(app.port, 300) as number:
        app.must(number > 250, f"expected 300 clients, found {number}")
        app.must(app.ask("GET", "/healthz")[0] == 200, "the page does not answer others")
        time.sleep(4)


@fault("half-requests-many")
def half_requests_many(at: Trial) -> None:
    """So many of them that no further file can be opened, for 5 s."""
    app = at.run()
    before = resource.prlimit(app.pid, resource.RLIMIT_NOFILE)
    open_now = len(list(Path(f"/proc/{app.pid}/fd").iterdir()))
    resource.prlimit(app.pid, resource.RLIMIT_NOFILE, (open_now + 40, before[1]))
    with app.fault(flows=True), world.half_requests(app.port, 90) as number:
        app.must(number > 40, f"expected more than 40 clients, found {number}")
        time.sleep(5)
    app.must(app.ask("GET", "/healthz")[0] == 200, "the page does not answer any more")


@fault("hostile-requests")
def hostile(at: Trial) -> None:
    """Foreign names, 1 MB headers, paths upwards, junk, JSON that is none."""
    app = at.run("--models", at.models(), "--recordings", at.folder / "recordings")
    own = f"Host: 127.0.0.1:{app.port}\r\n"
    controls = "/api/controls HTTP/1.1\r\n"
    json_head = own + "Content-Type: application/json\r\nContent-Length: "
    bodies = ("{", "[1]", '{"score_min": "x"}', '{"score_min": NaN}', "[" * 5000, '{"name": 1}')
    requests = [
        "GET /api/figures HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "GET /api/figures HTTP/1.1\r\n\r\n",
        f"POST {controls}{own}Origin: http://evil.example\r\nContent-Length: 2\r\n\r\n{{}}",
        f"GET / HTTP/1.1\r\n{own}X-Long: {'a' * 1_000_000}\r\n\r\n",
        f"GET /{'a' * 100_000} HTTP/1.1\r\n{own}\r\n",
        f"GET /../../etc/passwd HTTP/1.1\r\n{own}\r\n",
        f"GET /api/recordings/..%2f..%2f..%2fetc%2fpasswd HTTP/1.1\r\n{own}\r\n",
        f"GET /api/recordings/%00 HTTP/1.1\r\n{own}\r\n",
        f"DELETE /api/recordings/..%2f..%2fx HTTP/1.1\r\n{own}\r\n",
        f"PUT /api/models/..%2f..%2fx.onnx HTTP/1.1\r\n{own}Content-Length: 1\r\n\r\nx",
        f"JUNK / HTTP/1.1\r\n{own}\r\n",
        f"TRACE / HTTP/1.1\r\n{own}\r\n",
        f"GET /api/history?after=-1 HTTP/1.1\r\n{own}\r\n",
        f"POST {controls}{own}Content-Length: 99999999999\r\n\r\n{{}}" + " " * 70000,
        f"POST {controls}{own}Content-Length: -1\r\n\r\n",
        f"POST {controls}{own}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\xff" * 500,
        "\r\n" * 1000,
    ]
    for path in ("/api/controls", "/api/model", "/api/recording"):
        requests += [
            f"POST {path} HTTP/1.1\r\n{json_head}{len(body)}\r\n\r\n{body}" for body in bodies
        ]
    answers = set()
    with app.fault(flows=True):
        for request in requests:
            if request == "\r\n" * 1000:
                request += "GET /nowhere HTTP/1.0\r\n\r\n"
            line = world.raw(app.port, request.encode("latin-1"))
            answers.add(line[9:12].decode() or "closed")
            fine = not line or line[9:10] == b"4"
            app.must(fine, f"{request[:60]!r} was answered {line!r}")
    app.said.append(f"answers: {', '.join(sorted(answers))}")


# Models


def chosen(app: App, name: str, pattern: str, limit_s: float = 25.0) -> None:
    """Chooses a model and waits for what is told of it."""
    status, found = app.ask("POST", "/api/model", {"name": name})
    app.must(status == 202, f"{name}: expected 202, found {status}: {found}")
    app.shows("events.model", pattern, limit_s)


@fault("model-upload")
def model_upload(at: Trial) -> None:
    """Bad models are uploaded: noise, half of one, and a connection that is cut."""
    folder = at.models()
    app = at.run("--models", folder, token=True)
    whole = model_path("shipped-float").read_bytes()
    with app.fault(flows=True):
        for name, data in (("noise.onnx", os.urandom(300_000)), ("half.onnx", whole[:2_000_000])):
            status, found = app.ask("PUT", f"/api/models/{name}", data)
            app.must(status == 400, f"{name}: expected 400, found {status}")
            app.said.append(f"{name}: {found['error'] if isinstance(found, dict) else found}")
        with socket.create_connection(("127.0.0.1", app.port)) as link:
            head = f"PUT /api/models/cut.onnx HTTP/1.1\r\nHost: 127.0.0.1:{app.port}\r\n"
            head += f"Authorization: {app.headers['Authorization']}\r\nContent-Length: {len(whole)}"
            link.sendall(head.encode() + b"\r\n\r\n" + whole[:1_500_000])
            time.sleep(0.5)
            world.reset(link)
    left = until(lambda: not list(folder.iterdir()), 10)
    app.must(left, f"left in the folder: {sorted(path.name for path in folder.iterdir())}")


@fault("model-bad")
def model_bad(at: Trial) -> None:
    """Bad models lie in the folder and are chosen: noise, half of one."""
    folder = at.models()
    (folder / "noise.onnx").write_bytes(os.urandom(300_000))
    (folder / "half.onnx").write_bytes(model_path("shipped-float").read_bytes()[:2_000_000])
    app = at.run("--models", folder)
    with app.fault(flows=True):
        chosen(app, "noise.onnx", "noise.onnx.*expected")
        chosen(app, "half.onnx", "half.onnx.*expected")


@fault("model-hangs")
def model_hangs(at: Trial) -> None:
    """A model hangs when it is tried (6 s instead of 120 s)."""
    folder = at.models()
    world.hanging_model(folder / "hangs.onnx")
    app = at.run("--models", folder, inject="short-trials")
    with app.fault(flows=True):
        chosen(app, "hangs.onnx", "found one that hangs")
    app.must(not app.children(), "the process that tried it is left behind")


@fault("model-hangs-at-end")
def model_hangs_at_end(at: Trial) -> None:
    """The run is ended while a model hangs that is being tried."""
    folder = at.models()
    world.hanging_model(folder / "hangs.onnx")
    app = at.run("--models", folder)
    with app.fault(flows=True, lasts_s=3):
        app.ask("POST", "/api/model", {"name": "hangs.onnx"})
        time.sleep(1)
        app.must(app.children(), "nobody tries it")
        app.levels = tuple(n + 8 for n in app.levels)  # it is still being tried
    app.must(app.children(), "nobody tries it any more")


@fault("model-greedy")
def model_greedy(at: Trial) -> None:
    """A model wants 40 GB (its trial may have 6 GB)."""
    folder = at.models()
    world.greedy_model(folder / "greedy.onnx")
    app = at.run("--models", folder)
    with app.fault(flows=True):
        chosen(app, "greedy.onnx", "greedy.onnx.*expected")


@fault("model-deleted")
def model_deleted(at: Trial) -> None:
    """A model is deleted after it was listed, and while it is tried."""
    folder = at.models()
    shutil.copy(model_path("shipped-float"), folder / "gone.onnx")
    shutil.copy(model_path("shipped-float"), folder / "going.onnx")
    app = at.run("--models", folder)
    with app.fault(flows=True):
        listed = [one["name"] for one in app.ask("GET", "/api/models")[1]["models"]]
        app.must("gone.onnx" in listed, f"found {listed}")
        (folder / "gone.onnx").unlink()
        status, found = app.ask("POST", "/api/model", {"name": "gone.onnx"})
        app.must(status == 404, f"expected 404, found {status}")
        app.said.append(f"gone.onnx: {found.get('error')}")
        app.ask("POST", "/api/model", {"name": "going.onnx"})
        (folder / "going.onnx").unlink()
        app.shows("events.model", "going.onnx", 25)


# The machine


@fault("clock-jumps")
def clock_jumps(at: Trial) -> None:
    """The wall clock jumps a year ahead, then to a day ago, while it records."""
    log = at.folder / "events.jsonl"
    app = at.run("--events", log, "--recordings", at.folder / "recordings", inject="clock")
    app.ask("POST", "/api/recording", {"on": True})
    app.mark()
    with app.fault(flows=True, lasts_s=6):
        for shift_s in (365 * 86400, -86400):
            app.switch("clock", str(shift_s))
            time.sleep(3)
    status, found = app.ask("POST", "/api/recording", {"on": False})
    app.must(status == 200 and not found["error"], f"recording: {found}")
    seconds = app.ask("GET", "/api/recordings")[1]["recordings"][0]["seconds"]
    app.must(5 < seconds < 25, f"expected a recording of some 6 to 11 s, found {seconds}")
    last = app.ask("GET", "/api/events")[1]["events"][-1]["time"]
    app.must(abs(last + 86400 - time.time()) < 60, "events have not the clock's time")
    app.must(not app.figures["warnings"], f"it warns: {app.figures['warnings']}")


@fault("suspended")
def suspended(at: Trial) -> None:
    """The whole process is stopped for 10 s (SIGSTOP), as on a board that sleeps."""
    app = at.run()
    with app.fault(flows=False, lasts_s=10, undo=lambda: app.process.send_signal(signal.SIGCONT)):
        app.process.send_signal(signal.SIGSTOP)


@fault("memory-short")
def memory_short(at: Trial) -> None:
    """No more memory than it has for 5 s, and a larger model is chosen."""
    folder = at.models()
    shutil.copy(model_path("shipped-float"), folder / "large.onnx")
    app = at.run("--models", folder)
    pages = int(Path(f"/proc/{app.pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (4 << 20)
    unlimited = resource.RLIM_INFINITY
    free = lambda: resource.prlimit(app.pid, resource.RLIMIT_AS, (unlimited, unlimited))  # noqa: E731
    with app.fault(flows=False, lasts_s=5, undo=free):
        resource.prlimit(app.pid, resource.RLIMIT_AS, (limit, unlimited))
        status, found = app.ask("POST", "/api/model", {"name": "large.onnx"})
        app.said.append(f"chosen: {status} {found.get('error') if status != 202 else ''}")
    chosen(app, "large.onnx", "large.onnx")


@fault("files-short")
def files_short(at: Trial) -> None:
    """No further file or connection can be opened for 5 s."""
    folder = at.models()
    shutil.copy(model_path("shipped-float"), folder / "other.onnx")
    app = at.run("--models", folder, "--recordings", at.folder / "recordings")
    kept = app.link()
    app.ask("GET", "/healthz", kept=kept)
    before = resource.prlimit(app.pid, resource.RLIMIT_NOFILE)
    number = max(int(p.name) for p in Path(f"/proc/{app.pid}/fd").iterdir()) + 1
    with app.fault(flows=True, lasts_s=5):
        resource.prlimit(app.pid, resource.RLIMIT_NOFILE, (number, before[1]))
        with world.half_requests(app.port, 10):
            for what, body in (("recording", {"on": True}), ("model", {"name": "other.onnx"})):
                status, told = app.ask("POST", f"/api/{what}", body, kept)
                app.said.append(f"{what}: {status} {told.get('error') if status else told}")
            time.sleep(4)
        resource.prlimit(app.pid, resource.RLIMIT_NOFILE, before)
        kept.close()
        app.ask("POST", "/api/recording", {"on": False})


@fault("inference-raises")
def inference_raises(at: Trial) -> None:
    """Every fifth inference raises an error."""
    app = at.run(inject="inference")
    with app.fault(flows=True, undo=lambda: app.switch("inference", None)):
        app.switch("inference")
        app.shows("warnings", "fail")


@fault("drawing-raises")
def drawing_raises(at: Trial) -> None:
    """Every fifth picture cannot be drawn."""
    app = at.run(inject="drawing")
    with app.fault(flows=True, undo=lambda: app.switch("drawing", None)):
        app.switch("drawing")
        app.shows("events.sink", "could not be drawn")


@fault("page-dies")
def page_dies(at: Trial) -> None:
    """The page's server dies; MQTT is left to tell of it."""
    app, broker = with_broker(at, inject="page")
    ear = world.Ear(broker.port, "cam/state")
    at.later(ear.close)
    app.must(until(lambda: ear.told, 15), "no state over MQTT")
    before, at.page = ear.told["frames"], False
    began = time.monotonic()
    app.switch("page")
    app.must(until(lambda: app.ask("GET", "/healthz")[0] == 0, 10), "the page still answers")
    told = until(lambda: "live page has ended" in (ear.told["problem_text"] or ""), 15)
    app.must(told, f"expected that MQTT tells of it, found {ear.told['problem_text']}")
    app.said.append(f"mqtt problem_text: {ear.told['problem_text']}")
    time.sleep(6)  # two states, at least
    rate = (ear.told["frames"] - before) / (time.monotonic() - began)
    app.flowed = rate > 1
    app.must(app.flowed, f"expected frames to go on, found {rate:.1f} a second")
    app.settles()


@fault("pictures-die")
def pictures_die(at: Trial) -> None:
    """The thread that hands pictures to the page dies."""
    app = at.run(inject="pictures")
    with app.fault(flows=True):
        app.switch("pictures")
    app.must(at.viewer.goes_on(), "the viewer's picture stands still, and nobody says so")
    at.page = False


@fault("history-dies")
def history_dies(at: Trial) -> None:
    """The task that keeps the page's past dies."""
    app = at.run(inject="history")
    with app.fault(flows=True):
        app.switch("history")
    first = app.ask("GET", "/api/history")[1]["latest"]
    again = until(lambda: app.ask("GET", "/api/history")[1]["latest"] > first, 10)
    app.must(again, "the plots stand still, and nobody says so")


@fault("killed", HIDDEN)
def killed(at: Trial) -> None:
    """SIGKILL, which nothing survives: shows that this benchmark can fail."""
    app = at.run()
    with app.fault(flows=True):
        app.process.kill()


@fault("stuck", HIDDEN)
def stuck(at: Trial) -> None:
    """SIGSTOP without end: shows that this benchmark sees a run that hangs."""
    app = at.run()
    with app.fault(flows=True, lasts_s=6):
        app.process.send_signal(signal.SIGSTOP)
