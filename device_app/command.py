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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TextIO, TypeVar

from ..models.errors import EdgeSightError, OutputError
from ..models.memory import few_heaps
from ..models.zoo import model_path
from .camera_options import camera_options
from .config import as_toml, use_config
from .door import page_token
from .run_arguments import add_arguments as add_arguments

if TYPE_CHECKING:  # imported when the command runs, so that --help is instant
    from ..models.detector import OnnxDetector
    from .accuracy import Accuracy
    from .loop import Loop
    from .sinks import Sink
    from .sources import Source
    from .window import Window

T = TypeVar("T")
THREADS_MAX = 4
AUTO = "auto"
FILES = 8192
SWITCH_INTERVAL_S = 0.0005
"""Python hands its lock on after this; the usual 5 ms would make the network's thread wait."""

DESCRIPTION = (
    "Runs a detector live and shows its boxes, speed and accuracy on a web page.\n"
    "Ctrl-C (or SIGTERM, or a lost terminal) ends it at once, finishes its files and prints a\n"
    "summary; exit code 0."
)
EXAMPLE = "edgesight run --source 0"


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
            return _run(args, lambda text: _say(text, out))
        finally:
            _leave_stuck_threads()


def _run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    few_heaps()
    _allow_many_files()
    max_speed = (args.speed or ("max" if args.display == "none" else "recorded")) == "max"

    asked = camera_options(args)
    paged, windowed = args.display in ("web", "both"), args.display in ("window", "both")
    token = page_token(args.host, args.token_file) if paged else None

    def open_it() -> Source:
        from .open_source import open_source

        return open_source(args.source, max_speed=max_speed, loop=args.loop, camera=asked)

    # Beside the model: a stream takes its time, and must not hold up Ctrl-C meanwhile.
    opening = _InThread(open_it, "edgesight-open")
    from ..models.detector import OnnxDetector

    engine, threads = chosen_engine(args, say)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: opening.value.close() if opening.value is not None else None)

        def open_model(path: Path) -> OnnxDetector:
            head = args.head if path == own else None
            return OnnxDetector(path, head=head, threads=threads, engine=engine)

        own = model_path(args.model)
        detector = open_model(own)
        if detector.engine_note:
            say(f"engine: {detector.engine_note}; {detector.engine} runs it")
        from .accuracy import open_accuracy
        from .live import Controls, LiveView
        from .loop import Loop
        from .services import Services
        from .zones import Zones

        zones = Zones(args.zone) if args.zone else None

        source = opening.result()
        live = LiveView(Controls(score_min=args.score, plain=args.plain))

        def judge(judged: OnnxDetector) -> Accuracy:
            return open_accuracy(
                judged,
                source.classes,
                source.name,
                reference=args.reference,
                score=args.score,
                budget_percent=args.accuracy_budget,
            )

        accuracy = judge(detector)
        stack.callback(accuracy.close)
        sinks = open_sinks(args, source)
        undo = stack.enter_context(contextlib.ExitStack())
        for sink in sinks:
            undo.callback(sink.discard)
        loop = Loop(
            source,
            detector,
            score=args.score,
            live=live,
            display=paged or windowed,
            accuracy=accuracy,
            sinks=sinks,
            frames=args.frames,
            track=not (args.no_track or source.still),
            lossless=max_speed and not source.live,
            zones=zones,
        )
        del detector, accuracy  # the loop's now, which may change them
        services = stack.enter_context(Services(args, loop))
        for text in services.without_effect():
            say(f"note: {text}")
        window = services.open_window() if windowed else None
        if paged:
            out = sys.stderr if args.json else sys.stdout
            services.open_page(token, open_model, judge, say, out)
        undo.pop_all()  # from here on the loop finishes them
        from .summary import summary, table

        try:
            interrupted = _until_the_end(loop, source, say, window)
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


def _until_the_end(
    loop: Loop, source: Source, say: Callable[[str], None], window: Window | None
) -> bool:
    """Runs the loop; returns whether the user ended it."""
    interrupted = False
    for number in _ending_signals()[1:]:
        _on_signal(number, _interrupt)
    loop.start()
    try:
        interrupted = _watch(loop, say, window)
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


def _watch(loop: Loop, say: Callable[[str], None], window: Window | None) -> bool:
    """Waits for the end, telling how it goes: a line that renews itself, and what happens.

    Returns:
        Whether the user ended it in the window.
    """
    tty = sys.stderr.isatty()
    state = "running"
    while not loop.wait(1.0 if window is None else 0.0):
        if window is not None and _serve(window, loop):
            return True
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
    return False


def _serve(window: Window, loop: Loop) -> bool:
    """Draws in a window and hears its keys for a second; returns whether the user closed it."""
    for _ in range(4):
        if not window.pump(0.25):
            return True
        if loop.wait(0.0):  # keeps the figures fresh, too
            break
    return False


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


def _say(text: str, out: TextIO) -> None:
    """Prints for people; where it goes may be a full disk or a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, file=out, flush=True)
        except UnicodeEncodeError:  # a terminal of another alphabet
            print(text.encode("ascii", "backslashreplace").decode(), file=out, flush=True)


def _allow_many_files() -> None:
    """Viewers are files, too; systems that allow a process 1024 of them allow more if asked."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))


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
