"""What the page may change of the picture, checked as a whole before anything is changed."""

from __future__ import annotations

from typing import Any

from ..live import Controls
from .bodies import RefusedError

KEYS = ("boxes", "classes", "plain", "score_min")
CLASSES_MAX = 5000


def shown(controls: Controls) -> dict[str, Any]:
    """Returns the controls JSON-ready."""
    classes = controls.classes
    return {
        "boxes": controls.boxes,
        "score_min": controls.score_min,
        "classes": None if classes is None else sorted(classes),
        "plain": controls.plain,
    }


def change(controls: Controls, wanted: dict[str, Any], known: list[str]) -> None:
    """Applies wanted controls.

    Args:
        controls: Changed in place, or not at all.
        wanted: As it came.
        known: Names of the model's classes; empty if they are not told.

    Raises:
        RefusedError: Something of it is wrong.
    """
    if not wanted or wanted.keys() - set(KEYS):
        found = ", ".join(sorted(str(key)[:40] for key in wanted)[:5]) or "nothing"
        message = f"expected one or more of {', '.join(KEYS)}, found {found}; name one of these"
        raise RefusedError(400, message)
    checked: dict[str, Any] = {}
    for key in ("boxes", "plain"):
        if key in wanted:
            if not isinstance(wanted[key], bool):
                raise _wrong(key, "true or false", wanted[key])
            checked[key] = wanted[key]
    if (key := "score_min") in wanted:
        score = wanted[key]
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not 0 <= score <= 1:  # false for NaN, too
            raise _wrong(key, "a number within 0..1", score)
        checked[key] = float(score)
    if (key := "classes") in wanted:
        checked[key] = _classes(key, wanted[key], set(known))
    for key, value in checked.items():
        setattr(controls, key, value)


def _classes(key: str, wanted: Any, known: set[str]) -> frozenset[str] | None:
    if wanted is None:
        return None
    names = isinstance(wanted, list) and len(wanted) <= CLASSES_MAX
    if not names or not all(isinstance(name, str) for name in wanted):
        raise _wrong(key, "null for all, or a list of names", wanted)
    strange = [name for name in wanted if known and name not in known]
    if strange:
        raise _wrong(key, "names of the model's classes (/api/figures)", strange[0])
    return frozenset(wanted)


def _wrong(key: str, expected: str, found: Any) -> RefusedError:
    return RefusedError(400, f"{key}: expected {expected}, found {_brief(found)}; send another one")


def _brief(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 40 else f"{text[:40]}..."
