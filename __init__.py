"""EdgeSight: make object detectors small, and watch them run on edge boards.

The package has four rooms: ``models`` (what a detector is, no torch), ``compression`` (torch: makes
detectors small), ``device_app`` (the live camera app) and ``deploy`` (board tools).
"""

__version__ = "0.1.0"
