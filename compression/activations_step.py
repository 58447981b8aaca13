"""The recipe step ``activations``: ReLU in place of dearer activations, then a refit."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from .activations import activations_of, replace_activations
from .compensate import REFIT_PHOTOS_MAX, refit_to_original
from .photos import calibration_batches
from .settings import ActivationsStep
from .state import State, StepReport


def run_activations(state: State, config: ActivationsStep) -> tuple[State, StepReport]:
    """Replaces activations and refits the convolutions behind them to the original's outputs."""
    start = time.monotonic()
    job = state.job
    found = activations_of(state.net)
    wanted = {n: k for n, k in found.items() if not any(part in n for part in config.keep)}
    figures: dict[str, Any] = {"to": config.to, "replaced": dict(Counter(wanted.values()))}
    figures["kept"] = len(found) - len(wanted)
    if not wanted:
        note = f"nothing to replace: no activation that {config.to} is cheaper than"
        return state, StepReport("activations", time.monotonic() - start, figures, (note,))
    net = replace_activations(state.net, wanted, config.to)
    edit = {"kind": "activations", "to": config.to, "names": sorted(wanted)}
    changed = state.changed(net.eval(), edit)  # type: ignore[arg-type]
    batches = calibration_batches(
        job.photos.train_paths, state.spec, min(config.photos, REFIT_PHOTOS_MAX)
    )
    refit_to_original(changed, batches)
    return changed, StepReport("activations", time.monotonic() - start, figures)
