"""The gate's answer for scripts (JSON), for CI systems (JUnit XML) and for people (HTML, text)."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Any
from xml.etree import ElementTree

from .gate_pictures import WorstPhoto
from .verdict import Check, Verdict

SUITE = "edgesight regress"
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 does not let stand in a text, not even escaped."""
MARKS = {"pass": "pass", "fail": "FAIL", "not enough evidence": "unsure"}
BAR_W, BAR_H, EDGE = 220, 26, 8
WIDER = 0.15
"""Room on either side of what a bar shows, as part of it."""
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#59636e;--page:#fff;--line:#d1d9e0;--good:#1a7f37;
--bad:#c62828;--unsure:#9a6700;--soft:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9198a1;--page:#0d1117;--line:#3d444d;
--good:#3fb950;--bad:#ff6b60;--unsure:#d29922;--soft:#161b22}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.4rem .6rem;border-bottom:1px solid var(--line)}
.pass{color:var(--good)}.fail{color:var(--bad)}.unsure{color:var(--unsure)}.dim{color:var(--dim)}
.mark{font-weight:600;white-space:nowrap}figure{margin:1rem 0}img{max-width:100%;height:auto}
figcaption{color:var(--dim)}pre{background:var(--soft);padding:.8rem;overflow-x:auto}
svg{display:block}svg text{font:10px system-ui,sans-serif;fill:var(--dim)}
.wide{overflow-x:auto}"""
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>$title</title><style>$style</style></head>
<body><h1><span class="$css">$mark</span> $title</h1>
<p>$summary</p>
<h2>Checks</h2><div class="wide"><table>
<thead><tr><th>check</th><th>outcome</th><th>why</th><th>interval</th></tr></thead>
<tbody>$rows</tbody></table></div>
$pictures
<h2>Measured with</h2><pre>$facts</pre>
</body></html>
""")


def to_json(verdict: Verdict, facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer and what it rests on, JSON-ready.

    Args:
        verdict: The answer.
        facts: Further keys, as of the models, the data and the machine.
    """
    checks = [
        {
            "name": check.name,
            "kind": check.kind,
            "outcome": check.outcome,
            "required": check.required,
            "reason": check.reason,
            "figures": check.figures,
        }
        for check in verdict.checks
    ]
    answer = {"outcome": verdict.outcome, "passed": verdict.passed, "checks": checks}
    ready: dict[str, Any] = plain({**facts, **answer})
    return ready


def to_junit(verdict: Verdict, facts: dict[str, Any] | None = None, seconds: float = 0.0) -> str:
    """Returns JUnit XML: a test case for each check.

    Every required check that did not pass is a failure, one without enough evidence, too; those
    that only inform never are.

    Args:
        verdict: The answer.
        facts: Plain values become properties of the suite.
        seconds: That it all took.
    """
    failed = [check for check in verdict.checks if check.required and check.outcome != "pass"]
    counts = {"tests": str(len(verdict.checks)), "failures": str(len(failed)), "errors": "0"}
    time = f"{seconds:.3f}"
    root = ElementTree.Element("testsuites", {**counts, "time": time})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": SUITE, **counts, "skipped": "0", "time": time}
    )
    known = {k: v for k, v in (facts or {}).items() if isinstance(v, str | int | float)}
    if known:
        properties = ElementTree.SubElement(suite, "properties")
        for key, value in known.items():
            entry = {"name": _xml_text(key), "value": _xml_text(str(value))}
            ElementTree.SubElement(properties, "property", entry)
    for check in verdict.checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": f"edgesight.regress.{check.kind}",
                "name": _xml_text(check.name),
                "time": "0",
            },
        )
        reason = _xml_text(check.reason)
        if check.required and check.outcome != "pass":
            told = {"type": check.outcome, "message": reason}
            failure = ElementTree.SubElement(case, "failure", told)
            failure.text = _xml_text(f"{check.reason}\n{json.dumps(plain(check.figures))}")
        else:
            ElementTree.SubElement(case, "system-out").text = reason
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def to_html(verdict: Verdict, facts: dict[str, Any], pictures: Sequence[WorstPhoto] = ()) -> str:
    """Returns a page with everything inside; it asks nothing of the network.

    Args:
        verdict: The answer.
        facts: As for ``to_json``; ``new`` and ``old`` are named in the title.
        pictures: Of the worst photos.
    """
    names = [str((facts.get(key) or {}).get("name", "?")) for key in ("new", "old")]
    failed = sum(c.required and c.outcome == "fail" for c in verdict.checks)
    unsure = sum(c.required and c.outcome == "not enough evidence" for c in verdict.checks)
    summary = f"{len(verdict.checks)} checks, {failed} failed, {unsure} without enough evidence."
    if skipped := facts.get("skipped"):
        summary += f" Skipped: {', '.join(map(str, skipped))}."
    outcome = verdict.outcome if verdict.checks else "not enough evidence"
    page = PAGE.substitute(
        title=escape(f"{names[0]} against {names[1]}"),
        style=STYLE,
        css=_css(outcome),
        mark=escape(outcome),
        summary=escape(summary),
        rows="".join(map(_row, verdict.checks)),
        pictures=_pictures(pictures),
        facts=escape(json.dumps(plain(facts), indent=2)),
    )
    return _xml_text(page)


def to_text(verdict: Verdict) -> str:
    """Returns a table for a terminal: what did not pass comes last, where it is read."""
    order = {"pass": 0, "not enough evidence": 1, "fail": 2}
    rows = sorted(verdict.checks, key=lambda c: order[c.outcome] if c.required else 0)
    width = max((len(check.name) for check in rows), default=0)
    lines = [
        f"  {MARKS[c.outcome] if c.required else 'info':6} {c.name:{width}}  {c.reason}"
        for c in rows
    ]
    return "\n".join([*lines, "", f"regression gate: {verdict.outcome}"])


def interval_bar(figures: dict[str, Any]) -> str:
    """Returns an SVG of an interval beside what it is held against; empty where there is none.

    Args:
        figures: ``value``, ``difference`` or ``ratio``, with ``low`` and ``high``; ``margin_ap``
            (a line at minus it), ``slowdown_max`` (at 1 plus it), ``floor`` or ``limit`` (at it).
    """
    low, high = (_number(figures.get(key)) for key in ("low", "high"))
    middles = (_number(figures.get(key)) for key in ("value", "difference", "ratio"))
    value = next((one for one in middles if one is not None), None)
    if value is None or low is None or high is None or not low <= high:
        return ""
    lines: list[tuple[float, str]] = []
    if (margin := _number(figures.get("margin_ap"))) is not None:
        lines = [(-margin, "limit"), (0.0, "zero")]
    if (slower := _number(figures.get("slowdown_max"))) is not None:
        lines = [(1 + slower, "limit"), (1.0, "zero")]
    for key in ("floor", "limit"):
        if (at := _number(figures.get(key))) is not None:
            lines.append((at, "limit"))
    ends = [low, high, value, *(at for at, _ in lines)]
    room = WIDER * (max(ends) - min(ends)) or 1.0
    start, whole = min(ends) - room, max(ends) - min(ends) + 2 * room

    def x(number: float) -> float:
        return round(EDGE + (number - start) / whole * (BAR_W - 2 * EDGE), 1)

    parts = []
    for at, kind in lines:
        look = "var(--bad)" if kind == "limit" else "var(--line)"
        dash = ' stroke-dasharray="3 2"' if kind == "limit" else ""
        parts.append(f'<line x1="{x(at)}" x2="{x(at)}" y1="2" y2="24" stroke="{look}"{dash}/>')
    wide = max(1.0, round(x(high) - x(low), 1))
    parts.append(f'<rect x="{x(low)}" y="10" width="{wide}" height="6" fill="var(--dim)"/>')
    parts.append(f'<circle cx="{x(value)}" cy="13" r="4" fill="var(--ink)"/>')
    told = f"{value:.4g} [{low:.4g}, {high:.4g}]"
    told += "".join(f", limit {at:.4g}" for at, kind in lines if kind == "limit")
    return (
        f'<svg role="img" aria-label="{escape(told)}" width="{BAR_W}" height="{BAR_H}" '
        f'viewBox="0 0 {BAR_W} {BAR_H}"><title>{escape(told)}</title>{"".join(parts)}</svg>'
    )


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NaN and infinity as None, NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _row(check: Check) -> str:
    mark = check.outcome if check.required else "information"
    css = _css(check.outcome) if check.required else "dim"
    return (
        f'<tr><td>{escape(check.name)}<br><span class="dim">{escape(check.kind)}</span></td>'
        f'<td class="mark {css}">{escape(mark)}</td><td>{escape(check.reason)}</td>'
        f"<td>{interval_bar(check.figures)}</td></tr>\n"
    )


def _pictures(pictures: Sequence[WorstPhoto]) -> str:
    if not pictures:
        return ""
    figures = []
    for one in pictures:
        text = escape(f"{one.name}: {one.lost} true boxes lost, {one.gained} false alarms more")
        data = base64.b64encode(one.jpeg).decode()
        figures.append(
            f'<figure><img alt="{text}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f"<h2>Worst photos: old model left, new model right</h2>{''.join(figures)}"


def _css(outcome: str) -> str:
    return {"pass": "pass", "fail": "fail"}.get(outcome, "unsure")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _xml_text(text: str) -> str:
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
