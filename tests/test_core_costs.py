"""The table of convolution costs against single convolutions that were counted one by one."""

from __future__ import annotations

import pytest
from edgesight.models.core_costs import CORES, KINDS, conv_instructions
from edgesight.models.errors import InputError

# core, kind, inputs, outputs, kernel, groups, cells, stride, instructions that were counted for
# one convolution in the emulator (ONNX Runtime 1.31.1, less 25,000 of the profiler).
COUNTED = [
    ("cortex-a76", "s8", 116, 116, (1, 1), 1, 432, 1, 851_000),
    ("cortex-a76", "s8", 116, 128, (1, 1), 1, 432, 1, 858_000),
    ("cortex-a76", "u8", 116, 116, (1, 1), 1, 432, 1, 812_000),
    ("cortex-a72", "s8", 116, 116, (1, 1), 1, 432, 1, 2_224_000),
    ("cortex-a72", "u8", 116, 116, (1, 1), 1, 432, 1, 1_897_000),
    ("cortex-a76", "float", 116, 116, (1, 1), 1, 1728, 1, 7_639_000),
    ("cortex-a76", "float", 64, 64, (3, 3), 1, 432, 2, 7_087_000),
    ("cortex-a76", "float", 128, 128, (3, 3), 128, 432, 2, 4_228_000),
    ("cortex-a76", "s8", 128, 128, (3, 3), 128, 432, 1, 345_000),
    ("cortex-a76", "s8", 120, 120, (5, 5), 120, 432, 1, 862_000),
    ("cortex-a72", "s8", 58, 58, (3, 3), 58, 432, 1, 552_000),
    ("cortex-a76", "s8", 3, 24, (3, 3), 1, 432, 2, 220_000),
]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: "-".join(map(str, row[:5])))
def test_the_table_says_what_was_counted(row: tuple[object, ...]) -> None:
    *sizes, counted = row
    assert conv_instructions(*sizes) == pytest.approx(counted, rel=0.12)  # type: ignore[arg-type]


def test_what_pruning_must_know_of_integer_convolutions() -> None:
    def cost(inputs: int, outputs: int, groups: int = 1, core: str = "cortex-a76") -> float:
        kernel = (3, 3) if groups > 1 else (1, 1)
        return conv_instructions(core, "s8", inputs, outputs, kernel, groups, 432)

    assert cost(116, 116) == cost(128, 128)  # both are rounded up to 16
    assert cost(58, 58, 58) > 2 * cost(64, 64, 64)  # uneven depthwise: fewer channels, dearer
    assert cost(120, 120, 120) > cost(128, 128, 128)
    assert cost(112, 112, core="cortex-a72") > 2 * cost(112, 112)  # no dot product
    assert cost(64, 64, 64, core="cortex-a72") == cost(64, 64, 64)


def test_every_core_and_kind_grows_with_every_size() -> None:
    for core in CORES:
        for kind in KINDS:
            small = conv_instructions(core, kind, 16, 16, (3, 3), 1, 100)
            assert conv_instructions(core, kind, 32, 16, (3, 3), 1, 100) > small
            assert conv_instructions(core, kind, 16, 32, (3, 3), 1, 100) > small
            assert conv_instructions(core, kind, 16, 16, (5, 5), 1, 100) > small
            assert conv_instructions(core, kind, 16, 16, (3, 3), 1, 200) > small


def test_an_unknown_core_is_told_in_words() -> None:
    with pytest.raises(InputError, match=r"expected a core of cortex-a76.*found 'cortex-m4'"):
        conv_instructions("cortex-m4", "float", 3, 3, (1, 1), 1, 1)
