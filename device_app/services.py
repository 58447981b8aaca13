"""What runs beside the loop: the page, other models, recordings, MQTT, the log of events."""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..models.errors import InputError
from .door import announce, has_desktop, open_server
from .live import Figures

if TYPE_CHECKING:  # each is loaded only if it is wanted
    from ..models.detector import OnnxDetector
    from .accuracy import Accuracy
    from .loop import Loop
    from .model_choice import ModelChoice
    from .recording import Recorder
    from .web.server import Server
    from .window import Window


class Services:
    """Everything that is open beside a loop, and is closed with it; use it in a ``with``.

    Args:
        args: Of ``edgesight run``.
        loop: Not started yet.
    """

    def __init__(self, args: argparse.Namespace, loop: Loop) -> None:
        """Opens nothing yet."""
        self._args, self._loop, self._live = args, loop, loop.live
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Services:
        """Opens what needs nothing from outside.

        Raises:
            InputError: An option is wrong.
            OutputError: A file cannot be written.
        """
        try:
            self._check()
            self._open_event_log()
            self._open_mqtt()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Closes everything, the last first."""
        self._stack.close()

    def open_page(
        self,
        token: str | None,
        open_model: Callable[[Path], OnnxDetector],
        judge: Callable[[OnnxDetector], Accuracy],
        say: Callable[[str], None],
        out: TextIO,
    ) -> None:
        """Opens the live page with all that can be changed there, and says where it is.

        Args:
            token: What its viewers have to bring.
            open_model: Loads another model as the run's own was loaded.
            judge: Says how a detector is judged.
            say: Prints for people.
            out: Where a QR code may go.

        Raises:
            InputError: An option is wrong.
            OutputError: The address cannot be had.
        """
        args = self._args
        models = self._open_choice(open_model, judge, uploads=token is not None)
        recorder = self._open_recorder()
        server = open_server(
            self._live, args.host, args.port, token, models=models, recorder=recorder
        )
        self._stack.callback(server.stop)
        self._stack.callback(models.close)  # first: the page waits for the file that is being tried
        self._loop.add_figures(lambda figures: self._look_after(server, figures))
        here = announce(server.url, args.host, token, say, out)
        if not args.no_browser and has_desktop():
            threading.Thread(target=webbrowser.open, args=(here,), daemon=True).start()

    def open_window(self) -> Window:
        """Opens a window of this machine; it belongs to the main thread.

        Raises:
            MissingExtraError: The extra is not installed.
            OutputError: There is no screen.
        """
        from .window import Window

        name = self._loop.source.name
        window = Window(self._live, title=f"EdgeSight {name}", fullscreen=self._args.fullscreen)
        window.open()
        self._stack.callback(window.close)
        self._loop.showing.add_screen(window)

        def tell(figures: Figures) -> None:
            if window.error is not None:
                figures["warnings"].append(window.error)

        self._loop.add_figures(tell)
        return window

    def without_effect(self) -> list[str]:
        """Returns a line for each option that says something of what this run does not have."""
        args = self._args
        page, window = args.display in ("web", "both"), args.display in ("window", "both")
        missing = {
            "--fullscreen": args.fullscreen and not window and "a window: --display window",
            "--models": args.models is not None and not page and "a page: --display web",
            "--recordings": args.recordings is not None and not page and "a page: --display web",
            "--plain": args.plain and not (page or window) and "a picture: --display web",
            "--recordings-webm": args.recordings_webm
            and args.recordings is None
            and "--recordings FOLDER",
        }
        return [f"{name} has no effect without {what}" for name, what in missing.items() if what]

    def _check(self) -> None:
        """Refuses what could only fail later, or would have no effect."""
        args = self._args
        for option in ("mqtt_password_file", "mqtt_ca"):
            if args.mqtt is None and getattr(args, option) is not None:
                name = option.replace("_", "-")
                message = f"--{name}: expected --mqtt URL beside it, found none; name the broker"
                raise InputError(message)
        folder = args.recordings
        if folder is not None and folder.exists() and not folder.is_dir():
            message = f"--recordings: expected a folder, found a file {folder}; name another"
            raise InputError(message)
        if args.models is not None and not args.models.is_dir():
            message = f"--models: expected a folder with ONNX files, found none at {args.models}"
            raise InputError(message)

    def _look_after(self, server: Server, figures: Figures) -> None:
        if not server.alive:
            figures["warnings"].append("the live page has ended; start again to have it back")

    def _open_event_log(self) -> None:
        if self._args.events is None:
            return
        from .event_log import EventLog

        log = EventLog(self._args.events, self._live.events)
        self._stack.callback(log.close)

        def tell(figures: Figures) -> None:
            if log.error is not None:
                figures["warnings"].append(log.error)

        self._loop.add_figures(tell)

    def _open_mqtt(self) -> None:
        args = self._args
        if args.mqtt is None:
            return
        from .mqtt import MqttLink

        link = MqttLink(
            args.mqtt,
            self._live,
            name=args.name or socket.gethostname(),
            password_file=args.mqtt_password_file,
            ca_file=args.mqtt_ca,
            discovery=None if args.mqtt_discovery == "none" else args.mqtt_discovery,
        )
        link.start()
        self._stack.callback(link.stop)

        def tell(figures: Figures) -> None:
            figures["mqtt"] = link.state

        self._loop.add_figures(tell)

    def _open_recorder(self) -> Recorder | None:
        args = self._args
        if args.recordings is None:
            return None
        from .recording import Recorder

        recorder = Recorder(
            self._live, args.recordings, pre_roll_s=args.pre_roll, webm=args.recordings_webm
        )
        self._stack.callback(recorder.close)

        def tell(figures: Figures) -> None:
            figures["recording"] = recorder.state()

        self._loop.add_figures(tell)
        return recorder

    def _open_choice(
        self,
        open_model: Callable[[Path], OnnxDetector],
        judge: Callable[[OnnxDetector], Accuracy],
        *,
        uploads: bool,
    ) -> ModelChoice:
        from .model_choice import ModelChoice
        from .model_store import ModelStore

        args = self._args
        store = ModelStore(self._loop.detector.path, args.models, uploads)
        gate = args.model_gate
        choice = ModelChoice(
            self._loop, store, open_model, judge, score=args.score, gate_percent=gate
        )
        self._stack.callback(choice.close)
        return choice
