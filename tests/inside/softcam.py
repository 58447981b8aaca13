"""A real Picamera2 on libcamera's software camera: what it lacks on a machine without hardware.

Four shims: kms++ (only a preview on a screen would need it), frame buffers in memory files in place
of ``/dev/dma_heap``, no raw modes (the software camera has none), and a close that does not reach
for the heap. Everything else is picamera2 and libcamera as on a Raspberry Pi.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Any
from unittest.mock import MagicMock

sys.modules.setdefault("pykms", MagicMock(name="pykms"))

import libcamera
from picamera2 import picamera2 as module
from picamera2.allocators.allocator import Allocator, Sync


class MemoryAllocator(Allocator):
    """Frame buffers in memory files: one per buffer, one plane per colour plane."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[Any, list[Any]] = {}
        self._files: list[int] = []
        self.mapped: dict[Any, mmap.mmap] = {}
        self.sync = Mapped

    def allocate(self, libcamera_config: Any, use_case: Any) -> None:
        self.close()
        for stream in libcamera_config:
            made = []
            for number in range(stream.buffer_count):
                file = os.memfd_create(f"softcam-{number}")
                os.ftruncate(file, stream.frame_size)
                self._files.append(file)
                luma = stream.stride * stream.size.height
                spans = [(0, stream.frame_size)]
                if str(stream.pixel_format) == "NV12":
                    spans = [(0, luma), (luma, stream.frame_size - luma)]
                planes = []
                for offset, length in spans:
                    plane = libcamera.FrameBuffer.Plane()
                    plane.fd, plane.offset, plane.length = file, offset, length
                    planes.append(plane)
                buffer = libcamera.FrameBuffer(planes)
                self.mapped[buffer] = mmap.mmap(file, stream.frame_size)
                made.append(buffer)
            self._buffers[stream.stream] = made

    def buffers(self, stream: Any) -> list[Any]:
        return self._buffers[stream]

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._buffers, self._files, self.mapped = {}, [], {}


class Mapped(Sync):
    """One buffer, mapped."""

    def __init__(self, allocator: MemoryAllocator, buffer: Any, write: bool) -> None:
        self._allocator, self._buffer = allocator, buffer

    def __enter__(self) -> mmap.mmap:
        return self._allocator.mapped[self._buffer]

    def __exit__(self, *_: object) -> None:
        pass


class SoftPicamera2(module.Picamera2):
    """A real Picamera2 whose camera is software."""

    def __init__(self, camera_num: int = 0) -> None:
        super().__init__(camera_num, allocator=MemoryAllocator())

    def _get_raw_modes(self) -> list[dict[str, Any]]:
        roles = [libcamera.StreamRole.Viewfinder]
        formats = self.camera.generate_configuration(roles).at(0).formats
        return [
            {"format": str(kind), "size": (size.width, size.height)}
            for kind in formats.pixel_formats
            for size in formats.sizes(kind)
        ]

    def close(self) -> None:
        real, module.DmaAllocator = module.DmaAllocator, MemoryAllocator
        try:
            super().close()
        finally:
            module.DmaAllocator = real
