"""The spec: every field is checked, and the stored text gives it back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from edgesight.models.errors import ModelFileError
from edgesight.models.spec import ModelSpec


def test_json_and_back_is_the_same(tiny_spec: ModelSpec) -> None:
    spec = tiny_spec.with_changes(
        color="rgb",
        mean=(1.5, 2, 3),
        std=(4, 5, 6.25),
        resize="stretch",
        strides=(8, 16),
        reg_max=9,
    )
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("color", "grey"),
        ("resize", "crop"),
        ("input_format", "nchw"),
        ("input_hw", (32,)),
        ("input_hw", (32, 0)),
        ("input_hw", (32.5, 32)),
        ("input_hw", None),
        ("input_hw", (10**6, 32)),
        ("strides", (0,)),
        ("strides", 8),
        ("classes", ()),
        ("classes", (1, 2)),
        ("mean", (0, 0)),
        ("mean", 5),
        ("std", (1, 0, 1)),
        ("std", ("a", "b", "c")),
        ("pad_value", 256),
        ("pad_value", None),
        ("reg_max", 0),
        ("nms_iou", 0),
        ("nms_iou", 1.5),
        ("nms_iou", "0.5"),
    ],
)
def test_impossible_values_are_refused_in_one_line(
    tiny_spec: ModelSpec, field: str, value: Any
) -> None:
    values = json.loads(tiny_spec.to_json()) | {field: value}
    with pytest.raises(ModelFileError, match=r"model spec: .*; export the model again") as caught:
        ModelSpec.from_json(json.dumps(values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"head": "yolox"}', "5"])
def test_what_is_not_a_spec_is_refused(text: str) -> None:
    with pytest.raises(ModelFileError, match="model spec: expected"):
        ModelSpec.from_json(text)


def test_an_unknown_key_means_a_newer_file(tiny_spec: ModelSpec) -> None:
    values = json.loads(tiny_spec.to_json()) | {"rotation": 3}
    with pytest.raises(ModelFileError, match=r"unknown key 'rotation'.*newer edgesight"):
        ModelSpec.from_json(json.dumps(values))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"head": [], "input_hw": [8, 8], "classes": ["a"]}']
)
def test_hostile_specs_are_one_line(text: str) -> None:
    with pytest.raises(ModelFileError, match="model spec"):
        ModelSpec.from_json(text)


@pytest.mark.parametrize("bad", ["\ud800", "a\x1b]0;b\x07", "line\nline", "x" * 201, "", 5, None])
def test_names_that_cannot_be_shown_are_refused(bad: Any) -> None:
    with pytest.raises(ModelFileError, match="classes: expected 1 to 10000 names"):
        ModelSpec(head="yolox", input_hw=(32, 32), classes=("person", bad))
    if bad != "":
        with pytest.raises(ModelFileError, match="name: expected printable characters"):
            ModelSpec(head="yolox", input_hw=(32, 32), classes=("person",), name=bad)
