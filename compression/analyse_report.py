"""What an analysis found, as JSON, as sentences that say where the fat is, and as a table."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .analyse import Costs
from .layer_sensitivity import PRUNED_PART, RANK_PART, TREATMENTS
from .redundancy import ENERGY, PIXELS_PER_CHANNEL, OfActivations, OfWeights

HALF = 0.5
WIDTH = 100
NAMED = 5
"""So many layers are named in a sentence."""
ROOMY = 0.25
"""A layer that uses less than this part of its dimensions is worth a word."""
HARMLESS = {"points of AP": 0.1, "% of disagreement": 1.0}
"""A change that costs no more than this is called harmless."""
DEFINITIONS = {
    "activation_bytes": "column out kB: of a layer's output, 1 byte per number behind a quantizer",
    "weight_entropy_bits": (
        "column w bits: bits per weight of the histogram of the 8-bit codes, with one scale per "
        "output channel"
    ),
    "activation_entropy_bits": (
        "column a bits: bits per value of a histogram of 256 bins over the values' range, behind "
        "the activation"
    ),
    "effective_rank": (
        "column rank: dimensions that a layer's own output uses: exp of Shannon's entropy of the "
        "eigenvalues of its channels' covariance over all pixels of the photos, divided by their "
        "sum (Roy and Vetterli, 2007)"
    ),
    "dead_channels": "column dead: output channels that are the same everywhere in all photos",
    "weight_rank": (
        f"singular values of the weight matrix that hold {100 * ENERGY:.0f} % of its energy"
    ),
    "prune": (
        f"the {100 * PRUNED_PART:.0f} % of its output channels with the smallest weights set to 0"
    ),
    "factorise": f"its weight matrix at {100 * RANK_PART:.0f} % of weight_rank by SVD",
    "quantize": "its weights (a scale per output channel) and its output in 8 bits",
}

Row = dict[str, Any]


def report_of(
    costs: Costs,
    weights: Mapping[str, OfWeights],
    seen: Mapping[str, OfActivations],
    losses: Mapping[str, Mapping[str, float]],
    *,
    unit: str | None = None,
    facts: Mapping[str, Any],
) -> Row:
    """Returns everything that an analysis found, JSON-ready.

    Args:
        costs: Of the file.
        weights: By ``Layer.output``.
        seen: By ``Layer.output``; empty without photos.
        losses: By ``Layer.name``; empty without ``--sensitivity``.
        unit: Of the losses: a key of ``HARMLESS``.
        facts: Of file, photos and machine, to be shown.
    """
    totals = {k: v for k, v in costs.to_json().items() if k not in ("layers", "others")}
    short = short_names([layer.name for layer in costs.layers])
    rows = [
        {
            **asdict(layer),
            "short": short[layer.name],
            "family": layer.family,
            "redundancy": _redundancy(weights.get(layer.output), seen.get(layer.output)),
            "sensitivity": {t: round(v, 4) for t, v in losses.get(layer.name, {}).items()},
        }
        for layer in costs.layers
    ]
    report = {
        **facts,
        "totals": {"layers": len(rows), **totals},
        "layers": rows,
        "not_counted": [asdict(other) for other in costs.others],
        "unit": unit,
        "definitions": DEFINITIONS,
    }
    return {"findings": findings(report), **report}


def _redundancy(weights: OfWeights | None, seen: OfActivations | None) -> Row:
    found: Row = {}
    if weights is not None:
        found |= {
            "weight_entropy_bits": round(weights.entropy_bits, 3),
            "weight_rank": weights.rank,
            "weight_rank_max": weights.rank_max,
            "zero_channels": weights.zero_channels,
        }
    if seen is not None:
        found |= {
            "activation_entropy_bits": round(seen.entropy_bits, 3),
            "effective_rank": round(seen.effective_rank, 2),
            "channels": seen.channels,
            "dead_channels": seen.dead_channels,
            "pixels": seen.pixels,
            "rank_sure": seen.sure,
        }
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns names without what an exporter repeats: ``/a/a.0/a.0.1/Conv`` is ``a.0.1``."""
    short = {name: _short(name) for name in names}
    taken = list(short.values())
    return {name: s if taken.count(s) == 1 else name for name, s in short.items()}


def _short(name: str) -> str:
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1 and parts[-1].partition("_")[0] in ("Conv", "Gemm", "MatMul"):
        parts.pop()
    kept = [a for a, b in zip(parts, [*parts[1:], ""], strict=True) if not b.startswith(f"{a}.")]
    return "/".join(kept) or name


def findings(report: Row) -> list[str]:
    """Returns where the fat is, in sentences."""
    rows, totals = report["layers"], report["totals"]
    found = [
        _concentration(rows, "macs", f"{totals['macs'] / 1e6:,.1f} M multiply-accumulates"),
        _concentration(rows, "parameters", f"{totals['parameters'] / 1e6:,.3f} M parameters"),
        _families(rows, totals),
        _concentration(rows, "activation_bytes", _megabytes(totals["activation_bytes"], "outputs")),
        _file(totals),
        *_dimensions(rows),
        _dead(rows),
        _entropy(rows),
        *_sensitivity(rows, report["unit"]),
        _not_counted(report["not_counted"]),
    ]
    return [sentence for sentence in found if sentence]


def _concentration(rows: Sequence[Row], key: str, of: str) -> str:
    total = sum(row[key] for row in rows)
    if not total:
        return ""
    ranked = sorted(rows, key=lambda row: -row[key])
    held, count = 0, 0
    while held < HALF * total:
        held += ranked[count][key]
        count += 1
    layers = "layer holds" if count == 1 else "layers hold"
    part = f"{count} of {len(rows)} {layers} {100 * held / total:.0f} % of the {of}"
    return f"{part}: {_named(ranked[:count], lambda r: f'{100 * r[key] / total:.0f} %')}"


def _families(rows: Sequence[Row], totals: Row) -> str:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        for place, value in enumerate((1, row["macs"], row["parameters"])):
            sums[row["family"]][place] += value
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    parts = [
        f"{count} {family} with {100 * macs / max(1, totals['macs']):.0f} % of the MACs and "
        f"{100 * parameters / max(1, totals['parameters']):.0f} % of the parameters"
        for family, (count, macs, parameters) in ranked
    ]
    return "by kind: " + "; ".join(parts)


def _file(totals: Row) -> str:
    size = max(1, totals["file_bytes"])
    graph = size - totals["stored_bytes"]
    if graph < 0:
        return ""
    bits = 8 * totals["weight_bytes"] / max(1, totals["parameters"])
    return (
        f"of the file's {size / 1e6:.2f} MB, {100 * totals['weight_bytes'] / size:.0f} % are the "
        f"layers' parameters ({bits:.1f} bits each) and {100 * graph / size:.0f} % the description "
        "of the graph"
    )


def _dimensions(rows: Sequence[Row]) -> list[str]:
    known = [row for row in rows if "effective_rank" in row["redundancy"]]
    sure = [row for row in known if row["redundancy"]["rank_sure"]]
    if not known:
        return []
    found = []
    roomy = [row for row in sure if _used(row) < ROOMY and not row["last"]]
    if roomy:
        roomy.sort(key=lambda row: -row["macs"] * (1 - _used(row)))
        weighted = sum(row["macs"] * _used(row) for row in sure)
        weighted /= max(1, sum(row["macs"] for row in sure))
        found.append(
            f"{len(roomy)} of {len(sure)} layers use less than a quarter of their dimensions "
            f"(effective rank; weighted by MACs, {100 * weighted:.0f} % are used); most MACs to "
            f"gain: {_named(roomy, _dimensions_of)}"
        )
    if len(sure) < len(known):
        found.append(
            f"{len(known) - len(sure)} layers gave fewer than {PIXELS_PER_CHANNEL} pixels per "
            "channel: their effective rank (marked ~) looks smaller than it is; give more photos"
        )
    return found


def _used(row: Row) -> float:
    figures = row["redundancy"]
    return float(figures["effective_rank"] / max(1, figures["channels"]))


def _dimensions_of(row: Row) -> str:
    figures = row["redundancy"]
    return f"{figures['effective_rank']:.0f} of {figures['channels']}"


def _dead(rows: Sequence[Row]) -> str:
    """Says which channels can go for nothing: on the photos, or by their weights alone."""
    seen = any("dead_channels" in row["redundancy"] for row in rows)
    key = "dead_channels" if seen else "zero_channels"
    dead = [row for row in rows if row["redundancy"].get(key)]
    if not dead:
        return ""
    dead.sort(key=lambda row: -row["redundancy"][key])
    count = sum(row["redundancy"][key] for row in dead)
    why = "never change in these photos" if seen else "have weights that are all zero"
    names = _named(dead, lambda r: str(r["redundancy"][key]))
    return f"{count} channels in {len(dead)} layers {why} and can go: {names}"


def _entropy(rows: Sequence[Row]) -> str:
    known = [row for row in rows if "weight_entropy_bits" in row["redundancy"]]
    count = sum(row["parameters"] for row in known)
    if not count:
        return ""
    bits = sum(r["parameters"] * r["redundancy"]["weight_entropy_bits"] for r in known) / count
    return (
        f"in 8 bits the weights would carry {bits:.1f} bits each: an ideal entropy coder could "
        f"store them in {count * bits / 8e6:.2f} MB"
    )


def _sensitivity(rows: Sequence[Row], unit: str | None) -> list[str]:
    if unit is None:
        return []
    found = []
    limit = HARMLESS[unit]
    for treatment in TREATMENTS:
        known = [row for row in rows if treatment in row["sensitivity"]]
        if not known:
            continue

        def loss(row: Row, treatment: str = treatment) -> float:
            return float(row["sensitivity"][treatment])

        fragile = sorted(known, key=lambda row: -loss(row))[:3]
        paying = sorted(known, key=lambda row: -row["macs"] / max(loss(row), limit))[:3]
        hardy = sum(loss(row) <= limit for row in known)
        found.append(
            f"to {treatment} one layer alone hurts most at "
            f"{_named(fragile, lambda r: f'{loss(r):.1f}')}, in {unit}; {hardy} of {len(known)} "
            f"layers lose at most {limit:g}; most MACs for the least loss: "
            f"{_named(paying, lambda r: f'{loss(r):.1f}')}"
        )
    return found


def _not_counted(others: Sequence[Row]) -> str:
    if not others:
        return ""
    text = "not counted as multiply-accumulates: "
    text += ", ".join(f"{other['count']} {other['op']}" for other in others)
    unknown = [f"{o['unknown']} {o['op']}" for o in others if o["unknown"]]
    return text + (f"; of unknown size: {', '.join(unknown)}" if unknown else "")


def _named(rows: Sequence[Row], remark: Callable[[Row], str]) -> str:
    shown = [f"{row['short']} ({remark(row)})" for row in rows[:NAMED]]
    more = len(rows) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _megabytes(count: int, what: str) -> str:
    return f"{count / 1e6:.1f} MB of {what}"


Column = tuple[str, Callable[[Row], str]]


def columns(report: Row) -> list[Column]:
    """Returns the columns that this report can fill: title, and the text of a layer's cell."""
    totals = report["totals"]
    wanted: list[Column] = [
        ("layer", lambda r: r["short"]),
        ("kind", lambda r: r["kind"] if r["op"] in ("Conv", "ConvTranspose") else r["op"]),
        ("output", lambda r: "x".join(str(n) for n in r["output_shape"][1:])),
        ("params", lambda r: f"{r['parameters']:,}"),
        ("MACs M", lambda r: f"{r['macs'] / 1e6:.2f}"),
        ("%", lambda r: f"{100 * r['macs'] / max(1, totals['macs']):.1f}"),
        ("out kB", lambda r: f"{r['activation_bytes'] / 1e3:.0f}"),
        ("weights kB", lambda r: f"{r['weight_bytes'] / 1e3:.1f}"),
        ("w bits", lambda r: _figure(r, "weight_entropy_bits")),
        ("a bits", lambda r: _figure(r, "activation_entropy_bits")),
        ("rank", _rank_text),
        ("dead", lambda r: _whole(r, "dead_channels")),
    ]
    wanted += [(title, _loss_text(title)) for title in TREATMENTS]
    return [(t, cell) for t, cell in wanted if any(cell(row) != "" for row in report["layers"])]


def _figure(row: Row, key: str) -> str:
    value = row["redundancy"].get(key)
    return "" if value is None else f"{value:.1f}"


def _whole(row: Row, key: str) -> str:
    value = row["redundancy"].get(key)
    return "" if value is None else str(value)


def _rank_text(row: Row) -> str:
    figures = row["redundancy"]
    if "effective_rank" not in figures:
        return ""
    mark = "" if figures["rank_sure"] else "~"
    return f"{mark}{figures['effective_rank']:.0f}/{figures['channels']}"


def _loss_text(treatment: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = row["sensitivity"].get(treatment)
        return "" if value is None else f"{value:.1f}"

    return text


def as_text(report: Row, top: int) -> str:
    """Returns what a person reads: sentences, the costliest layers, totals."""
    totals = report["totals"]
    chosen = sorted(report["layers"], key=lambda row: -row["macs"])[:top]
    head = columns(report)
    cells = [[title for title, _ in head]] + [[cell(r) for _, cell in head] for r in chosen]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = [f"{report['file']} ({totals['file_bytes'] / 1e6:.2f} MB, opset {totals['opset']})", ""]
    for sentence in (*report["findings"], *(f"note: {note}" for note in report["notes"])):
        lines += textwrap.wrap(
            sentence,
            WIDTH,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines.append("")
    for line in cells:
        padded = [
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    left = len(report["layers"]) - len(chosen)
    if left:
        rest = totals["macs"] - sum(row["macs"] for row in chosen)
        lines.append(f"and {left} layers more with {rest / 1e6:.2f} M MACs (--top N shows more)")
    lines.append(
        f"total: {totals['layers']} layers, {totals['parameters'] / 1e6:.3f} M parameters, "
        f"{totals['macs'] / 1e6:,.2f} M MACs, "
        f"{_megabytes(totals['activation_bytes'], 'outputs')}, "
        f"{totals['weight_bytes'] / 1e6:.2f} MB of weights"
    )
    if report["unit"]:
        lines.append(f"prune, factorise, quantize: {report['unit']} when it is done to one layer")
    return "\n".join(lines)
