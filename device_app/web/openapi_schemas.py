"""The shapes of what the page's API takes and gives, as JSON Schema: for ``openapi.py``."""

from __future__ import annotations

from typing import Any

from .history import COLUMNS

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}
NUMBER_OR_NULL: Schema = {"type": ["number", "null"]}


def described(schema: Schema, text: str) -> Schema:
    """Returns a schema that says what it is."""
    return {**schema, "description": text}


def ref(name: str) -> Schema:
    """Returns a reference to one of ``schemas``."""
    return {"$ref": f"#/components/schemas/{name}"}


def listed(items: Schema, text: str = "") -> Schema:
    """Returns the schema of a list."""
    found: Schema = {"type": "array", "items": items}
    return described(found, text) if text else found


def mapped(values: Schema, text: str) -> Schema:
    """Returns the schema of an object whose keys are names."""
    return described({"type": "object", "additionalProperties": values}, text)


def record(text: str, needed: str, /, **fields: Schema) -> Schema:
    """Returns the schema of an object with known keys.

    Args:
        text: What it is.
        needed: Keys that are always there, with blanks between; ``*``: all of them.
        **fields: Their schemas.
    """
    found: Schema = {"type": "object", "description": text, "properties": fields}
    names = list(fields) if needed == "*" else needed.split()
    return {**found, "required": names} if names else found


def closed(schema: Schema) -> Schema:
    """Returns the schema of an object that may have no other keys."""
    return {**schema, "additionalProperties": False}


def schemas() -> dict[str, Schema]:
    """Returns all schemas by name."""
    controls: Schema = {
        "boxes": described(FLAG, "whether boxes are drawn"),
        "score_min": described(
            {**NUMBER, "minimum": 0, "maximum": 1}, "score from which a box is drawn"
        ),
        "classes": {
            "type": ["array", "null"],
            "items": STRING,
            "description": "names of the classes whose boxes are drawn; null: all",
        },
        "plain": described(FLAG, "whether the figures stay off the picture"),
    }
    return {
        "Error": record(
            "Why there is no other answer.",
            "*",
            error=described(STRING, "expected ..., found ...; what to do"),
        ),
        "Percentiles": record("Milliseconds.", "*", p50=NUMBER_OR_NULL, p90=NUMBER_OR_NULL,
                              p99=NUMBER_OR_NULL),
        "Accuracy": record(
            "How good the boxes are, and how that is known; in percent.",
            "kind text",
            kind=described(STRING, "labels, agreement (with a reference model), or none"),
            text=STRING,
            precision=NUMBER_OR_NULL,
            recall=NUMBER_OR_NULL,
            f1=NUMBER_OR_NULL,
            f1_low=described(NUMBER_OR_NULL, "95 % interval of f1"),
            f1_high=NUMBER_OR_NULL,
            ap50=described(NUMBER_OR_NULL, "only with labels"),
            frames=described(WHOLE, "frames behind it"),
            reference=TEXT_OR_NULL,
        ),
        "Board": record(
            "How the machine is; null where it does not tell.",
            "",
            cpu_percent=described(NUMBER_OR_NULL, "of all cores together"),
            own_cpu_percent=described(NUMBER_OR_NULL, "of one core, this process"),
            memory_mb=NUMBER_OR_NULL,
            memory_free_mb=NUMBER_OR_NULL,
            temperature_c=NUMBER_OR_NULL,
            clock_mhz=NUMBER_OR_NULL,
            clock_max_mhz=NUMBER_OR_NULL,
            throttled=listed(STRING, "what holds the board back now"),
            throttled_before=listed(STRING, "what has, since it was switched on"),
            says=described(TEXT_OR_NULL, "one line for people, if something is wrong"),
        ),
        "Figures": record(
            "Everything that the page shows; keys may be absent at the start.",
            "viewers controls run events parts",
            model=STRING,
            source=STRING,
            source_state=described(STRING, "running, retrying: why, or ended"),
            frames=described(WHOLE, "that went through the detector"),
            dropped=described(WHOLE, "that were replaced by newer ones unseen"),
            capture_fps=NUMBER_OR_NULL,
            inference_fps=NUMBER_OR_NULL,
            display_fps=NUMBER_OR_NULL,
            stages_ms=mapped(ref("Percentiles"), "by stage, of the latest frames"),
            latency_ms=described(ref("Percentiles"), "from capture to the encoded picture"),
            accuracy=ref("Accuracy"),
            detections=mapped(WHOLE, "boxes on the newest frame, per class"),
            elapsed_s=NUMBER_OR_NULL,
            board=ref("Board"),
            classes=listed(STRING, "everything that the model knows"),
            zones=mapped(mapped(WHOLE, "per class"), "objects inside, by zone"),
            recording=ref("Recording"),
            mqtt=described(STRING, "connected, or retrying: why"),
            warnings=listed(STRING, "what does not work while the run goes on"),
            viewers=described(WHOLE, "that look at the picture"),
            run=described(STRING, "changes with each start of EdgeSight: numbers begin anew"),
            events=described(WHOLE, "number of the latest event"),
            controls=ref("Controls"),
            parts=listed({"enum": ["models", "recorder"]}, "what this run has besides"),
        ),
        "History": record(
            "The last minutes, one row a second, by column; null where nothing is known.",
            "*",
            run=described(STRING, "as in Figures"),
            latest=described(WHOLE, "number of the last row: ask for what is after it"),
            interval_s=NUMBER,
            kept=described(WHOLE, "rows that are kept at most"),
            age_s=listed(NUMBER, "seconds since each row, the oldest first"),
            **{name: listed(NUMBER_OR_NULL) for name in COLUMNS},
            seen_s=mapped(NUMBER, "seconds since each class was seen last"),
        ),
        "Event": record(
            "One thing that happened.",
            "*",
            number=described(WHOLE, "its place in the run, from 1"),
            kind=described(STRING, "enter, leave, source, model, recording or sink"),
            text=described(STRING, "one line for people"),
            time=described(NUMBER, "Unix time in seconds"),
            data={"type": "object", "description": "more of it; keys depend on the kind"},
        ),
        "Events": record(
            "The latest events, the oldest first; 200 are kept.",
            "*",
            run=described(STRING, "as in Figures"),
            latest=described(WHOLE, "number of the latest event"),
            events=listed(ref("Event")),
        ),
        "Controls": record("What viewers may change; it is one picture for all.", "*", **controls),
        "ControlsChange": {
            **closed(record("One or more of the controls; the others stay.", "", **controls)),
            "minProperties": 1,
        },
        "Models": record(
            "The models that can be chosen.",
            "*",
            current=described(STRING, "the one that runs"),
            busy=described(TEXT_OR_NULL, "the one that is being checked"),
            phase=described(STRING, "what is being done with it"),
            error=described(TEXT_OR_NULL, "why the last one was refused or rolled back"),
            uploads=described(FLAG, "whether new files are taken"),
            uploads_refused=described(TEXT_OR_NULL, "why not, and what would help"),
            bytes_max=described(WHOLE, "size of the largest file that is taken"),
            models=listed(record("One model.", "*", name=STRING, bytes=WHOLE, current=FLAG)),
        ),
        "ModelChoice": closed(
            record("Which model is to run.", "*",
                   name={**STRING, "minLength": 1, "maxLength": 200})
        ),
        "Recording": record(
            "How the recording is.",
            "*",
            on=FLAG,
            name=described(TEXT_OR_NULL, "of the file that grows"),
            seconds=NUMBER,
            pre_roll_s=described(NUMBER, "seconds before the button that it begins with"),
            error=described(TEXT_OR_NULL, "why the last one ended by itself"),
        ),
        "RecordingSwitch": closed(record("Begin or end.", "*", on=FLAG)),
        "Recordings": record(
            "The finished recordings.",
            "*",
            recordings=listed(
                record("One file.", "name bytes", name=STRING, bytes=WHOLE,
                       seconds=NUMBER_OR_NULL, time=described(NUMBER, "Unix time in seconds"))
            ),
        ),
        "Health": record("The source gives pictures.", "*", source_state=STRING, frames=WHOLE),
    }  # fmt: skip
