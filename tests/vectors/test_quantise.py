from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemb.errors import GembError
from gemb.vectors import (
    Int8Ranges,
    calibrate,
    from_bfloat16,
    from_binary,
    from_int8,
    to_bfloat16,
    to_binary,
    to_float16,
    to_int8,
)
from tests.vectors.conftest import Rows


def every_float_with_zero_low_bits() -> NDArray[np.float32]:
    """float32 numbers around every rounding decision of bfloat16: all high halves, low halves that matter."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (high[:, None] | low).view(np.float32).reshape(1, -1)


def reference_quantise(*arguments: Any, **options: Any) -> NDArray[Any]:  # noqa: ANN401  # as in the library
    """`quantize_embeddings` of sentence-transformers."""
    quantisation = pytest.importorskip("sentence_transformers.util.quantization")
    quantised: NDArray[Any] = quantisation.quantize_embeddings(*arguments, **options)
    return quantised


# Sixteen-bit floats


def test_bfloat16_equals_torch_on_every_rounding_decision() -> None:
    numbers = every_float_with_zero_low_bits()
    expected = torch.from_numpy(numbers.copy()).to(torch.bfloat16)
    patterns = to_bfloat16(numbers)
    finite = ~np.isnan(numbers)
    assert np.array_equal(patterns[finite], expected.view(torch.uint16).numpy()[finite])
    assert np.isnan(from_bfloat16(patterns)[~finite]).all()
    assert np.array_equal(from_bfloat16(patterns)[finite], expected.float().numpy()[finite])


def test_float16_equals_torch(unit_rows: Rows) -> None:
    vectors = unit_rows(50, 64)
    assert np.array_equal(to_float16(vectors), torch.from_numpy(vectors).half().numpy())


def test_a_value_beyond_float16_is_told() -> None:
    vectors = np.array([[1, 2], [70000, 1]], np.float32)
    with pytest.raises(GembError) as caught:
        to_float16(vectors)
    assert str(caught.value) == (
        "a value of 70000 does not fit float16 (65504 at most); store f32 or bf16, or normalise"
    )


# int8


def test_int8_equals_sentence_transformers_with_the_same_ranges(unit_rows: Rows) -> None:
    vectors = unit_rows(500, 96)
    vectors[:, 3] = 0.25  # a constant dim
    ranges = calibrate(vectors[:200])
    codes, _ = to_int8(vectors, ranges)
    assert np.array_equal(codes, reference_quantise(vectors, "int8", ranges=ranges.as_array()))
    expected = reference_quantise(vectors, "int8", calibration_embeddings=vectors[:200])
    assert np.array_equal(codes, expected)


def test_int8_codes_of_rows_worked_out_by_hand() -> None:
    # Steps of 1 and 0.5, which float32 holds exactly.
    ranges = Int8Ranges(np.array([-127.5, 0], np.float32), np.array([127.5, 127.5], np.float32))
    vectors = np.array([[-127.5, 0], [127.5, 127.5], [0, 0.5], [-129, 300], [0.4, 0.49]], np.float32)
    codes, clipped = to_int8(vectors, ranges)
    # 0 + 127.5 = 127.5 -> 127 - 128; 0.5 / 0.5 = 1 -> 1 - 128; 0.49 / 0.5 = 0.98 -> 0 - 128
    assert codes.tolist() == [[-128, -128], [127, 127], [-1, -127], [-128, 127], [-1, -128]]
    assert clipped == 2


def test_int8_is_within_half_a_step_of_every_value_in_range(unit_rows: Rows) -> None:
    vectors = unit_rows(400, 32)
    ranges = calibrate(vectors)
    codes, clipped = to_int8(vectors, ranges)
    half_step = (ranges.maximum - ranges.minimum) / 510
    # The largest value is a step's upper end; float32 rounding moves it by far less than 1e-6.
    inside = vectors < ranges.maximum
    error = np.abs(from_int8(codes, ranges) - vectors)
    assert (error <= half_step + 1e-6)[inside].all()
    assert clipped == 0


def test_a_constant_dim_comes_back_as_its_value() -> None:
    vectors = np.full((4, 2), 0.5, np.float32)
    ranges = calibrate(vectors)
    assert np.array_equal(from_int8(to_int8(vectors, ranges)[0], ranges), vectors)


def test_ranges_joined_block_by_block_are_those_of_the_whole(unit_rows: Rows) -> None:
    vectors = unit_rows(100, 16)
    joined = calibrate(vectors[:40]).joined(calibrate(vectors[40:]))
    assert np.array_equal(joined.as_array(), calibrate(vectors).as_array())
    assert np.array_equal(Int8Ranges.from_array(joined.as_array()).as_array(), joined.as_array())


def test_ranges_of_one_row_are_refused(unit_rows: Rows) -> None:
    with pytest.raises(GembError) as caught:
        calibrate(unit_rows(1, 8))
    assert str(caught.value) == ("int8 ranges need at least 2 rows to calibrate on, not 1; store f32 or f16")


def test_ranges_that_are_none_are_refused() -> None:
    with pytest.raises(GembError) as caught:
        Int8Ranges(np.array([0, 2], np.float32), np.array([1, 1], np.float32))
    assert str(caught.value) == (
        "int8 ranges must be finite, each minimum at most its maximum; calibrate them again"
    )


# One bit


def test_binary_equals_sentence_transformers(unit_rows: Rows) -> None:
    vectors = unit_rows(50, 64)
    vectors[0, :3] = [0, -0.0, 1e-45]
    assert np.array_equal(to_binary(vectors), reference_quantise(vectors, "ubinary"))


def test_binary_comes_back_as_signs() -> None:
    vectors = np.array([[0.1, -0.1, 0, 5, -5, 1, 1, -1]], np.float32)
    assert to_binary(vectors).tolist() == [[0b10010110]]
    assert from_binary(to_binary(vectors)).tolist() == [[1, -1, -1, 1, -1, 1, 1, -1]]


def test_binary_products_are_dims_minus_twice_the_hamming_distance(unit_rows: Rows) -> None:
    packed = to_binary(unit_rows(10, 64))
    signs = from_binary(packed)
    hamming = np.bitwise_count(packed[:, None] ^ packed[None]).sum(axis=2)
    assert np.array_equal(signs @ signs.T, 64 - 2.0 * hamming)
