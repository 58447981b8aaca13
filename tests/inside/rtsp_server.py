"""An RTSP server on loopback: a moving ball in H.264, 30 frames a second. Prints its address."""

from __future__ import annotations

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer

PIPELINE = (
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=30/1 ! "
    "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay name=pay0 pt=96 )"
)

Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory(shared=True)
factory.set_launch(PIPELINE)
server.get_mount_points().add_factory("/ball", factory)
server.attach(None)
print(f"rtsp://127.0.0.1:{server.get_bound_port()}/ball", flush=True)
GLib.MainLoop().run()
