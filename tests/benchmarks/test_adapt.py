"""The benchmark of adapting judges a writing by the copy beside it, and starts from a decoder."""

from pathlib import Path

import pytest

from benchmarks.adapt import Lap, bars_of, write_decoder
from gemb.model.adapting import Wanted, plan
from gemb.model.attention import is_bidirectional, reach_of_layers
from gemb.model.folder import read_folder
from tests.models import tiny_folder


def test_a_round_is_judged_by_its_own_copy_and_memory_by_the_worst() -> None:
    ours = [Lap(1.0, 3.0, 400_000_000), Lap(1.0, 2.0, 510_000_000), Lap(1.0, 9.0, 300_000_000)]
    copies = [Lap(0.0, 2.0, 1), Lap(0.0, 2.0, 1), Lap(0.0, 4.0, 1)]
    time, memory = bars_of({"gemb": ours, "copy": copies})
    assert (time.measured, time.met) == (1.5, True)  # 1.5, 1 and 2.25
    assert memory.measured == pytest.approx(0.51)
    assert not memory.met


def test_the_decoder_has_the_weights_of_the_encoder_and_its_mask(tmp_path: Path) -> None:
    encoder = tiny_folder(tmp_path / "encoder", "gemma3")
    source = read_folder(write_decoder(encoder, tmp_path / "decoder"))
    assert not is_bidirectional(reach_of_layers(source.config) or ())
    adaptation = plan(source, Wanted())
    assert adaptation.size_bytes == read_folder(encoder).weights().size_bytes
    assert adaptation.tensors.left_out == ()
