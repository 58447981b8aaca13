"""What ``faults.py`` makes fail inside a run: copied as ``sitecustomize``, loaded before all else.

Each part is asked for in EDGESIGHT_INJECT and begins when a file of its name appears beside it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

switches = Path(__file__).parent
WHY = "injected fault"


def on(name):
    """Whether a switch is thrown."""
    return (switches / name).exists()


def once(name):
    """True a single time after the switch was thrown."""
    try:
        (switches / name).unlink()
    except FileNotFoundError:
        return False
    return True


def every(n, name, function, error):
    """Fails each n-th call while the switch is on."""
    calls = [0]

    def failing(*args, **more):
        calls[0] += 1
        if calls[0] % n == 0 and on(name):
            raise error(WHY)
        return function(*args, **more)

    return failing


if "edgesight" in sys.orig_argv and "run" in sys.orig_argv:  # not a model's trial run
    wanted = os.environ["EDGESIGHT_INJECT"].split()
    if "inference" in wanted:
        from edgesight.models.detector import OnnxDetector

        OnnxDetector.infer = every(5, "inference", OnnxDetector.infer, RuntimeError)
    if "drawing" in wanted:
        from edgesight.models import draw

        draw.draw_detections = every(5, "drawing", draw.draw_detections, RuntimeError)
    if "page" in wanted:
        import uvicorn

        tick = uvicorn.Server.on_tick

        async def _tick(self, counter):
            if once("page"):
                raise RuntimeError(WHY)
            return await tick(self, counter)

        uvicorn.Server.on_tick = _tick
    if "pictures" in wanted:
        from edgesight.device_app.live import LiveView

        wait_newer = LiveView.wait_newer

        def _failing(self, *args):
            if threading.current_thread().name == "web-pictures" and once("pictures"):
                raise RuntimeError(WHY)
            return wait_newer(self, *args)

        LiveView.wait_newer = _failing
    if "history" in wanted:
        from edgesight.device_app.web.history import History

        sample = History.sample

        def _failing_sample(self, now_s):
            if once("history"):
                raise RuntimeError(WHY)
            return sample(self, now_s)

        History.sample = _failing_sample
    if "short-trials" in wanted:  # 120 s
        from edgesight.models.trial_run import trial_run

        trial_run.__kwdefaults__["time_max_s"] = 6.0
    if "short-keepalive" in wanted:  # 15 s
        from edgesight.device_app.mqtt import MqttLink

        MqttLink.__init__.__kwdefaults__["keepalive_s"] = 3
    if "clock" in wanted:  # of the wall alone; monotonic clocks do not jump

        def _shift():
            try:
                return float((switches / "clock").read_text() or 0)
            except (OSError, ValueError):
                return 0.0

        real, real_ns, strftime = time.time, time.time_ns, time.strftime
        time.time = lambda: real() + _shift()
        time.time_ns = lambda: real_ns() + int(1e9 * _shift())
        for name in ("gmtime", "localtime"):
            first = getattr(time, name)
            setattr(time, name, lambda s=None, f=first: f(time.time() if s is None else s))
        time.strftime = lambda form, when=None: strftime(form, when or time.localtime())
