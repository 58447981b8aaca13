"""Where the trials of a search are kept: an Optuna study, in a file or in a shared database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..models.errors import MissingExtraError, RecipeError
from .space import RATIO
from .targets import Search

if TYPE_CHECKING:
    import optuna

STUDY_FILE: Final = "study.sqlite"
WAIT_S: Final = 60
"""So long a process waits for another one that writes to the study's file."""
STARTUP_TRIALS: Final = 6
"""So many are chosen blindly before results guide the choice."""


def spent_s(study: optuna.Study) -> float:
    """Returns the seconds in which at least one finished trial of a study was at work."""
    spans = sorted(
        (t.datetime_start.timestamp(), float(t.user_attrs.get("seconds", 0)))
        for t in study.get_trials(deepcopy=False)
        if t.datetime_start is not None
    )
    total, until = 0.0, 0.0
    for start, seconds in spans:
        end = start + seconds
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def open_study(folder: Path, wanted: Search, digest: str, seed: int) -> optuna.Study:
    """Opens a study, or begins it.

    Args:
        folder: Of the results; the study is kept there if ``wanted`` does not name a place.
        wanted: Names place and study.
        digest: Names the study if ``wanted`` does not.
        seed: Of the first process; those that join choose by other dice.

    Raises:
        RecipeError: The place cannot be used.
        MissingExtraError: Optuna, or the driver of a database, is missing.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise MissingExtraError.of(package="optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    address = wanted.storage or f"sqlite:///{folder / STUDY_FILE}"
    name = wanted.study or f"edgesight-{digest[:12]}"
    options = {"connect_args": {"timeout": WAIT_S}} if address.startswith("sqlite") else None
    try:
        storage = optuna.storages.RDBStorage(address, engine_kwargs=options)
        known = name in optuna.study.get_all_study_names(storage)
        return optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            direction="minimize",
            sampler=optuna.samplers.TPESampler(
                seed=None if known else seed % 2**32, n_startup_trials=STARTUP_TRIALS
            ),
            pruner=optuna.pruners.SuccessiveHalvingPruner(1, RATIO, 0),
        )
    except (ImportError, optuna.exceptions.OptunaError, SQLAlchemyError, ValueError) as error:
        place = _without_password(address)
        reason = " ".join(str(error).split()).replace(address, place)[:160]
        message = (
            f"search.storage: expected an address where Optuna can keep a study, found {place} "
            f"({reason}); correct it, or install its driver"
        )
        raise RecipeError(message) from error


def _without_password(address: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(address).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return address.partition("@")[2] or address
