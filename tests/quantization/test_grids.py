"""The integer grids: equal to gguf-py and to transformers' Gemma layers, idempotent, and their goldens."""

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from gemb.quantization.grids import GRIDS, INT4_ROW, INT8_ROW, Q4_0, Q8_0, BlockGrid, Grid, RowGrid

BLOCK_GRIDS = pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
ROW_GRIDS = pytest.mark.parametrize("grid", [INT4_ROW, INT8_ROW], ids=lambda grid: grid.name)
ALL_GRIDS = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
LINE = torch.linspace(-1, 1, 32)


def hard_values() -> Tensor:
    """[8192, 128], 1,048,576 numbers in the kinds a grid can go wrong on, 1,024 rows each."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(8, 1024, 128, generator=generator)
    whole = torch.randint(-16, 17, (1024, 128), generator=generator).float()
    kinds = [
        normal[0] * 0.02,  # weights as they are
        normal[1] ** 5,  # heavy tails
        whole / 2,  # ties in size, with both signs, and codes that end in a half
        torch.where(normal[2] > 0.5, normal[2], 0.0),  # many zeros, some blocks of nothing else
        normal[3] * 1e-39,  # denormals: scales of 0 in float16, reciprocals that overflow
        normal[4] * 3e-6,  # scales that are denormal in float16
        normal[5].clamp(-3, 3) * 1.7e5,  # scales close to the largest float16
        normal[6] * torch.exp2(whole),  # 32 powers of two in one block
    ]
    return torch.cat(kinds)


@BLOCK_GRIDS
def test_a_million_hard_values_give_the_bytes_of_gguf_and_its_numbers(grid: BlockGrid) -> None:
    values = hard_values()
    assert values.numel() >= 1_000_000
    kind = GGMLQuantizationType[grid.name.upper()]
    # Denormal scales overflow their reciprocals in gguf-py too; it warns of them.
    with np.errstate(all="ignore"):
        theirs = quantize(values.numpy(), kind)
    ours = grid.pack(grid.quantise(values))
    assert ours.shape == (8192, 4 * grid.block_bytes)
    assert int((ours != torch.from_numpy(theirs)).sum()) == 0
    back = torch.from_numpy(dequantize(theirs, kind))
    assert bool(back.isfinite().all())
    assert torch.equal(grid.snap(values), back)


@BLOCK_GRIDS
def test_bytes_are_unpacked_to_what_was_packed(grid: BlockGrid) -> None:
    quantised = grid.quantise(hard_values()[::64])
    again = grid.unpack(grid.pack(quantised))
    assert torch.equal(again.codes, quantised.codes)
    assert torch.equal(again.scales, quantised.scales)


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows_are_read_by_the_gemma_layers_of_transformers(bits: int, width: int) -> None:
    from transformers.integrations.gemma_quant import QuantizedLinear

    grid = RowGrid(bits)
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    quantised = grid.quantise(weight)
    layer = QuantizedLinear(width, 5, num_bits=bits)
    packed = grid.pack(quantised.codes)
    assert packed.shape == layer.weight.shape
    assert packed.dtype == layer.weight.dtype
    layer.weight.data, layer.weight_scale.data = packed, quantised.scales
    assert torch.equal(layer._dequantize_weights(), grid.snap(weight))
    assert torch.equal(grid.unpack(packed, width), quantised.codes)


@ALL_GRIDS
def test_quantising_the_snapped_values_changes_nothing(grid: Grid) -> None:
    # Not the kind whose numbers are denormal: there 7 scales can fall on 0.
    values = hard_values()[:4096]
    once, twice = grid.quantise(values), grid.quantise(grid.snap(values))
    nonzero = once.scales != 0
    assert torch.equal(twice.scales, once.scales)
    assert int(nonzero.sum()) > 0.9 * nonzero.numel()
    assert torch.equal(grid.snap(grid.snap(values)), grid.snap(values))


@ALL_GRIDS
def test_rows_do_not_depend_on_their_neighbours_and_any_shape_is_a_stack_of_rows(grid: Grid) -> None:
    values = hard_values()[::512]
    whole = grid.snap(values)
    assert torch.equal(torch.stack([grid.snap(row) for row in values]), whole)
    assert torch.equal(grid.snap(values.view(2, -1, 128)), whole.view(2, -1, 128))
    assert torch.equal(grid.snap(values.flip(0)), whole.flip(0))


@ALL_GRIDS
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_power_of_two_passes_through(grid: Grid, factor: float) -> None:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    assert torch.equal(grid.snap(values * factor), grid.snap(values) * factor)


@ALL_GRIDS
def test_zeros_stay_zeros_and_no_row_gives_no_row(grid: Grid) -> None:
    assert torch.equal(grid.snap(torch.zeros(3, 64)), torch.zeros(3, 64))
    assert grid.snap(torch.zeros(0, 64)).shape == (0, 64)


@ALL_GRIDS
def test_half_precision_is_quantised_as_its_float32_values(grid: Grid) -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert torch.equal(grid.snap(values), grid.snap(values.float()))


def test_q4_0_of_a_line_matches_its_golden() -> None:
    quantised = Q4_0.quantise(LINE)
    codes = (quantised.codes + 8).tolist()
    assert quantised.scales.tolist() == [0.125]
    assert codes[:6] == [0, 1, 1, 2, 2, 3]
    assert codes[-6:] == [13, 14, 14, 15, 15, 15]
    assert float((Q4_0.snap(LINE) - LINE).abs().max()) == 0.125
    assert Q4_0.pack(quantised).numel() == 18


def test_q8_0_of_a_line_matches_its_golden() -> None:
    quantised = Q8_0.quantise(LINE)
    (scale,) = quantised.scales.tolist()
    assert scale == pytest.approx(0.0078735, abs=5e-8)
    error = float((Q8_0.snap(LINE) - LINE).abs().max())
    assert error == pytest.approx(0.00382, abs=5e-6)
    assert error <= scale / 2
    assert Q8_0.pack(quantised).numel() == 34


def test_q4_0_of_normal_blocks_errs_by_at_most_a_scale() -> None:
    values = torch.randn(1000, 32, generator=torch.Generator().manual_seed(5))
    error = (Q4_0.snap(values) - values).abs() / Q4_0.quantise(values).scales.float().abs()
    assert 0.9 < float(error.max()) <= 1.003  # a clipped opposite; 0.003 is the rounding of the float16 scale


@ROW_GRIDS
def test_a_row_has_one_scale_and_errs_by_at_most_half_of_it(grid: RowGrid) -> None:
    values = torch.randn(1000, 96, generator=torch.Generator().manual_seed(5))
    quantised = grid.quantise(values)
    assert quantised.scales.shape == (1000, 1)
    assert torch.equal(quantised.scales, quantised.scales.bfloat16().float())
    error = (grid.snap(values) - values).abs() / quantised.scales
    assert float(error.max()) <= 0.5 + 1e-5  # float32 division
    assert int(quantised.codes.abs().max()) == grid.highest


def test_int4_row_matches_its_golden() -> None:
    quantised = INT4_ROW.quantise(torch.tensor([[-7.0, -2.5, 0.5, 1.5, 3.4]]))
    assert quantised.scales.tolist() == [[1.0]]
    assert quantised.codes.tolist() == [[-7, -2, 0, 2, 3]]
    assert INT4_ROW.pack(quantised.codes).tolist() == [[1 | 6 << 4, 8 | 10 << 4, 11 | 8 << 4]]


@BLOCK_GRIDS
def test_values_too_large_or_not_finite_show_in_the_scales(grid: BlockGrid) -> None:
    for bad in (float("nan"), float("inf"), 1e30):
        values = torch.ones(2, 64)
        values[1, 40] = bad
        assert grid.quantise(values).scales.isfinite().tolist() == [[True, True], [True, False]]


def test_the_errors_name_the_grid_the_rule_and_the_value() -> None:
    with pytest.raises(ValueError, match=r"^q4_0 has blocks of 32, but the rows are 100 wide$"):
        Q4_0.quantise(torch.zeros(2, 100))
    with pytest.raises(ValueError, match=r"^q8_0 has blocks of 32, but the rows are 1 wide$"):
        Q8_0.quantise(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^q4_0 has blocks of 18 bytes, but a row is 20 bytes long$"):
        Q4_0.unpack(torch.zeros(2, 20, dtype=torch.uint8))
