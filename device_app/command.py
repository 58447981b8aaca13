"""``edgesight run``: a detector live on a camera, a video, photos or the samples."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from ..models.arguments import number_type, whole_number
from ..models.errors import EdgeSightError, OutputError
from ..models.zoo import MODEL_HELP, model_path
from .camera_options import add_camera_arguments, camera_options
from .config import add_config_arguments, as_toml, use_config
from .door import PORT_DEFAULT, announce, has_desktop, open_server, page_token

if TYPE_CHECKING:  # imported when the command runs, so that --help is instant
    from .loop import Loop
    from .sinks import Sink
    from .sources import Source

T = TypeVar("T")
THREADS_MAX = 4
CPU, AUTO = "onnxruntime", "auto"  # of models/engines.py and engine_choice.py, which load much
SWITCH_INTERVAL_S = 0.0005
"""Python hands its lock on after this; the usual 5 ms would make the network's thread wait."""

DESCRIPTION = (
    "Runs a detector live and shows its boxes, speed and accuracy on a web page.\n"
    "Ctrl-C (or SIGTERM, or a lost terminal) ends it at once, finishes its files and prints a\n"
    "summary; exit code 0."
)
EXAMPLE = "edgesight run --source 0"


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
    add("--display", choices=("web", "none"), default="web", help="live web page, or nothing")
    add(
        "--host",
        default="127.0.0.1",
        help="address that the page listens on; beyond this machine it asks for a token, which the "
        "link that is printed holds (default: %(default)s)",
    )
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the page's token, as the variable EDGESIGHT_TOKEN does (default: a new one for "
        "each run)",
    )
    add(
        "--port",
        type=whole_number(0, 65535),
        help=f"port of the page (default: {PORT_DEFAULT}, or the next free one)",
    )
    add("--no-browser", action="store_true", help="do not open the page in a browser")
    add("--frames", type=whole_number(1, 10**12), metavar="N", help="end after N frames")
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
    add(
        "--speed",
        choices=("recorded", "max"),
        help="files at recorded speed (drops frames that come too fast, as a camera does) or as "
        "fast as the network can, every frame (default: recorded, with --display none: max)",
    )
    add(
        "--no-track",
        action="store_true",
        help="do not follow objects from frame to frame (no ids, and counts of each frame alone)",
    )
    add("--loop", action="store_true", help="start files again at their end")
    add("--jsonl", type=Path, metavar="FILE", help="write the detections, one JSON object a frame")
    add("--video", type=Path, metavar="FILE", help="write the picture with its boxes (.mp4)")
    add("--head", metavar="KIND", help="head of a foreign model that its file does not tell")
    add("--json", action="store_true", help="end with one JSON object as the last line")
    add_camera_arguments(parser)
    add_config_arguments(parser)


def prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Takes the defaults from the file that ``--config`` names."""
    use_config(parser, words)
    parser.set_defaults(print_all=lambda args: as_toml(parser, args))


def main(args: argparse.Namespace) -> int:
    """Runs until the source ends, ``--frames`` are done, or the user stops it.

    Returns:
        0, also when the user stopped it: that is how a live run ends.

    Raises:
        EdgeSightError: Something that the user gave is wrong, or was lost.
    """
    if args.print_config:
        print(args.print_all(args))
        return 0
    out = sys.stderr if args.json else sys.stdout
    with _signals_restored():
        try:
            return _run(args, lambda text: print(text, file=out, flush=True))
        finally:
            _leave_stuck_threads()


def _run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    max_speed = (args.speed or ("max" if args.display == "none" else "recorded")) == "max"

    asked = camera_options(args)
    token = page_token(args.host, args.token_file) if args.display == "web" else None

    def open_it() -> Source:
        from .open_source import open_source

        return open_source(args.source, max_speed=max_speed, loop=args.loop, camera=asked)

    # Beside the model: a stream takes its time, and must not hold up Ctrl-C meanwhile.
    opening = _InThread(open_it, "edgesight-open")
    from ..models.detector import OnnxDetector

    engine, threads = chosen_engine(args, say)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: opening.value.close() if opening.value is not None else None)
        detector = OnnxDetector(
            model_path(args.model), head=args.head, threads=threads, engine=engine
        )
        if detector.engine_note:
            say(f"engine: {detector.engine_note}; {detector.engine} runs it")
        from .accuracy import open_accuracy
        from .live import Controls, LiveView
        from .loop import Loop

        source = opening.result()
        live = LiveView(Controls(score_min=args.score))
        if args.display == "web":
            server = open_server(live, args.host, args.port, token)
            stack.callback(server.stop)
            out = sys.stderr if args.json else sys.stdout
            here = announce(server.url, args.host, token, say, out)
            if not args.no_browser and has_desktop():
                threading.Thread(target=webbrowser.open, args=(here,), daemon=True).start()
        accuracy = open_accuracy(
            detector,
            source.classes,
            source.name,
            reference=args.reference,
            score=args.score,
            budget_percent=args.accuracy_budget,
        )
        stack.callback(accuracy.close)
        loop = Loop(
            source,
            detector,
            score=args.score,
            live=live,
            display=args.display == "web",
            accuracy=accuracy,
            sinks=open_sinks(args, source),
            frames=args.frames,
            track=not (args.no_track or source.still),
            lossless=max_speed and not source.live,
        )
        from .summary import summary, table

        try:
            interrupted = _until_the_end(loop, source, say)
        except EdgeSightError:  # what was seen until then is worth telling all the same
            if loop.stats.inference.n:
                say(table(summary(loop, threads=threads, interrupted=False)))
            raise
    found = summary(loop, threads=threads, interrupted=interrupted)
    say(table(found))
    if args.json:
        print(json.dumps(found), flush=True)
    return 0


def chosen_engine(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """Returns the engine that runs the network, and with how many threads.

    Raises:
        EdgeSightError: The engine is not installed, or the model cannot be used.
    """
    threads = args.threads or default_threads()
    if args.engine != AUTO:
        return args.engine, threads
    from ..models.dataset import load_image
    from ..models.engine_choice import choose
    from .sources_photos import SAMPLES

    path = model_path(args.model)
    images = [load_image(photo) for photo in sorted(SAMPLES.glob("*.jpg"))]
    best, remembered = choose(path, images, threads, head=args.head, exactly=bool(args.threads))
    how = "remembered" if remembered else "measured"
    say(f"engine: {best.engine}, {best.threads} thread(s): {best.p50_ms:.1f} ms ({how})")
    return best.engine, best.threads


def _until_the_end(loop: Loop, source: Source, say: Callable[[str], None]) -> bool:
    """Runs the loop; returns whether the user ended it."""
    interrupted = False
    for number in _ending_signals()[1:]:
        _on_signal(number, _interrupt)
    loop.start()
    try:
        _watch(loop, say)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        # A second signal must not cut off the end of a video; all of this takes a second at most.
        for number in _ending_signals():
            _on_signal(number, signal.SIG_IGN)
        loop.stop_unless_done()
        try:
            source.close()
        finally:
            loop.finish()
    return interrupted


def _watch(loop: Loop, say: Callable[[str], None]) -> None:
    """Waits for the end, telling how it goes: a line that renews itself, and what happens."""
    tty = sys.stderr.isatty()
    state = "running"
    while not loop.wait(1.0):
        figures = loop.live.figures()
        before, state = state, figures["source_state"]
        if state != before:
            say(f"{figures['source']}: {state}")
        if tty:
            seen = ", ".join(f"{n} {name}" for name, n in sorted(figures["detections"].items()))
            line = (
                f"{figures['frames']} frames, {figures['inference_fps']:.1f}/s, "
                f"{figures['dropped']} dropped: {seen or 'nothing'}"
            )
            print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)
    if tty:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def open_sinks(args: argparse.Namespace, source: Source) -> list[Sink]:
    """Returns the files that the user asked for.

    Raises:
        OutputError: One of them cannot be created.
    """
    from .sinks import JsonlSink, VideoSink

    sinks: list[Sink] = []
    if args.jsonl is not None:
        sinks.append(JsonlSink(args.jsonl))
    if args.video is not None:
        try:
            sinks.append(VideoSink(args.video, source.fps, live=source.live))
        except OutputError:
            for sink in sinks:
                sink.discard()
            raise
    return sinks


def default_threads() -> int:
    """Returns the cores that this process may use less one for the rest of the loop, at most 4."""
    cores = os.cpu_count() or 1
    if sys.platform.startswith("linux"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(THREADS_MAX, cores - 1))


class _InThread(Generic[T]):
    """Calls a function in a thread that may be left behind, and gives its result or error."""

    def __init__(self, function: Callable[[], T], name: str) -> None:
        self.value: T | None = None
        self._error: BaseException | None = None
        self._function = function
        self._thread = threading.Thread(target=self._call, name=name, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        while self._thread.is_alive():
            self._thread.join(0.1)  # in small pieces: Ctrl-C gets through on every system
        if self._error is not None:
            raise self._error
        assert self.value is not None
        return self.value


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _ending_signals() -> list[signal.Signals]:
    """Returns the signals that end a run; a link to the board that breaks is one (nohup: not)."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return found


def _on_signal(number: signal.Signals, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        signal.signal(number, handler)


@contextlib.contextmanager
def _signals_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            _on_signal(number, handler)


def _leave_stuck_threads() -> None:
    """Makes the process end although a thread of ours hangs in a driver.

    Python would go on to take the runtime apart under that thread's feet, which crashes.
    """
    error = sys.exc_info()[0]
    code = 0 if error is None else 130 if error is KeyboardInterrupt else 2
    ours = [t for t in threading.enumerate() if t.name.startswith("edgesight-")]
    for thread in ours:
        thread.join(0.1)
    if not any(thread.is_alive() for thread in ours):
        return

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
