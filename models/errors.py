"""All errors that EdgeSight raises on purpose.

The command line prints them as one line and ends with exit code 2; everything else that is raised
is a defect of EdgeSight and keeps its traceback::

    EdgeSightError
    +-- InputError            something that the user gave us is wrong
        +-- ModelFileError    a model file: not ONNX, truncated, fits no head, other network
        +-- DatasetError      photos or boxes: missing, empty, corrupt, inconsistent
        +-- RecipeError       a compression recipe: unknown key, impossible target
        +-- SourceError       a camera, video, folder or stream that cannot be opened
        +-- DownloadError     a download that failed or has the wrong SHA-256
        +-- OutputError       a result that cannot be written: disk full, no permission, port in use
        +-- MissingExtraError a part of EdgeSight that needs an optional install

Every message says what was expected, what was found, and what to do.
"""

from __future__ import annotations


class EdgeSightError(Exception):
    """Base of all errors that EdgeSight raises on purpose."""


class InputError(EdgeSightError):
    """Something that the user gave us is wrong."""


class ModelFileError(InputError):
    """A model file is missing, truncated, not ONNX, or fits no known head."""


class DatasetError(InputError):
    """Photos or annotations are missing, empty, corrupt or inconsistent."""


class RecipeError(InputError):
    """A compression recipe has an unknown key, a wrong value or an impossible target."""


class SourceError(InputError):
    """A camera, video, folder or stream cannot be opened or has vanished."""


class DownloadError(InputError):
    """A download failed or has the wrong SHA-256."""


class OutputError(InputError):
    """A result cannot be written: disk full, no permission, port in use."""


class MissingExtraError(InputError):
    """A part of EdgeSight needs an optional install."""

    @classmethod
    def of(cls, *, package: str, extra: str = "compress") -> MissingExtraError:
        """Returns the error for a package that an extra brings."""
        return cls(f"expected the package {package}, found none; pip install '.[{extra}]'")
