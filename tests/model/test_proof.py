"""A model that does not see what its config.json says is found out, whatever its flags claim."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemb.errors import Exit, MismatchError
from gemb.model import proof as module
from gemb.model.encoder import PackedEncoder
from gemb.model.folder import read_folder
from gemb.model.kernels import Kernels
from gemb.model.proof import Proof, prove_bidirectional
from tests.models import SORTS, tiny_folder

Make = Callable[..., PackedEncoder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A tiny encoder by the name of its sort."""

    def encoder(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PackedEncoder:
        place = tmp_path / f"{name}-{len(options)}"
        if not place.exists():
            tiny_folder(place, name, **options)  # type: ignore[arg-type]
        return PackedEncoder(read_folder(place), Kernels("cpu", dtype))

    return encoder


@pytest.mark.parametrize("name", SORTS)
def test_every_family_sees_what_its_config_says(name: str, make: Make) -> None:
    found = prove_bidirectional(make(name))
    assert found == Proof(not SORTS[name].is_causal, not SORTS[name].is_causal, 0.0)


def test_a_causal_model_that_declares_to_be_bidirectional_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EmbeddingGemma in an older transformers: the flag is set, nobody heeds it."""
    from gemb.model.families import gated

    decoder = make("gemma3 as a decoder")
    causal = gated.layer_reaches(decoder.folder.text_config)
    with monkeypatch.context() as patch:
        patch.setattr(gated, "layer_reaches", lambda _: causal)
        liar = make("gemma3")
    with pytest.raises(MismatchError) as caught:
        prove_bidirectional(liar)
    assert caught.value.exit_code == Exit.MISMATCH
    assert str(caught.value) == (
        f"{liar.folder.path / 'config.json'} says bidirectional attention, but the model computes causal "
        "attention (seen in the state of a text's first token when its last one is changed); its vectors "
        "would be wrong; try the newest gemb and transformers, or report the model"
    )


def test_a_bidirectional_model_that_declares_to_be_causal_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemb.model.families import gated

    full = gated.layer_reaches(make("llama without causality").folder.text_config)
    with monkeypatch.context() as patch:
        patch.setattr(gated, "layer_reaches", lambda _: full)
        liar = make("llama")
    with pytest.raises(MismatchError, match=r"says causal attention, but the model computes bidirectional "):
        prove_bidirectional(liar)


def test_a_model_that_is_bidirectional_only_in_company_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM2Vec's bug: with one text there is no padding, so no mask, so the causal default (its issue 74)."""
    model = make("llama without causality")
    causal = make("llama", config={"attention_bias": True})
    states = model.states

    def changing(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        return (causal.states if len(lengths) == 1 else states)(ids, lengths)

    monkeypatch.setattr(model, "states", changing)
    with pytest.raises(MismatchError, match=r"computes bidirectional in some batches and causal in others "):
        prove_bidirectional(model)


def test_a_vector_that_depends_on_its_neighbours_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")
    forward = model.forward

    def leaking(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        return forward(ids, lengths) + 1e-3 * len(lengths)

    monkeypatch.setattr(model, "forward", leaking)
    found = prove_bidirectional(model)
    assert found.neighbour_difference == pytest.approx(3e-3, rel=1e-3)
    assert str(found) == (
        "bidirectional (as config.json says, proved); neighbours in a batch move a vector by 3.0e-03 at most"
    )


def test_a_sound_proof_reads_well(make: Make) -> None:
    assert str(prove_bidirectional(make("qwen3"))) == (
        "causal (as config.json says, proved); a vector does not depend on its neighbours in a batch"
    )
    assert str(Proof(True, None, 0.0)) == (
        "bidirectional (proved; config.json does not tell); "
        "a vector does not depend on its neighbours in a batch"
    )


def test_a_family_without_known_rules_is_told_as_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "reach_of_layers", lambda _: None)
    assert prove_bidirectional(make("bert")) == Proof(True, None, 0.0)
    assert prove_bidirectional(make("llama")) == Proof(False, None, 0.0)


def test_narrow_windows_and_few_layers_are_proved_too(make: Make) -> None:
    """A text longer than the way through all layers could not move its first token."""
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 2}
    assert prove_bidirectional(make("gemma3", config=one)).is_bidirectional


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_a_collapsed_model_is_told_as_that_and_not_refused_as_causal(
    name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name)
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def collapsed(ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> Tensor:
        # The rounding of a real one: the last place of some numbers.
        noise = torch.from_numpy(ids % 3 - 1)[:, None] * torch.finfo(torch.float32).eps
        return state * (1 + noise)

    monkeypatch.setattr(model, "states", collapsed)
    for _ in range(2):  # the second is remembered
        found = prove_bidirectional(model)
        assert found.is_collapsed
        assert str(found) == (
            "the model gives nearly the same states for all texts, so it cannot tell them apart, and "
            "which way it attends is not proved; go back to the model that it was made from"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SORTS)
def test_no_sound_model_is_told_to_be_collapsed(name: str, dtype: torch.dtype, make: Make) -> None:
    assert not prove_bidirectional(make(name, dtype)).is_collapsed


# --- the cache


def test_a_model_is_proved_once(make: Make, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    first = prove_bidirectional(make("bert"))
    assert len(list((own_cache / "proofs").iterdir())) == 1
    monkeypatch.setattr(module, "_prove", lambda _: pytest.fail("it was proved once more"))
    assert prove_bidirectional(make("bert")) == first


def test_another_model_dtype_or_torch_is_proved_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    prove_bidirectional(make("bert"))
    prove_bidirectional(make("bert", torch.bfloat16))
    prove_bidirectional(make("roberta"))
    again = make("bert")
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    prove_bidirectional(again)
    assert len(list((own_cache / "proofs").iterdir())) == 4


@pytest.mark.parametrize("content", ["", "[]", "{", '{"is_bidirectional": true}', json.dumps({
    "is_bidirectional": "yes", "is_declared": True, "neighbour_difference": 0.0})])  # fmt: skip
def test_a_spoilt_cache_costs_only_the_proof(content: str, make: Make, own_cache: Path) -> None:
    expected = prove_bidirectional(make("bert"))
    (file,) = (own_cache / "proofs").iterdir()
    file.write_text(content)
    assert prove_bidirectional(make("bert")) == expected
    assert json.loads(file.read_text())["is_bidirectional"] is True


def test_a_cache_that_cannot_be_written_is_harmless(make: Make, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    assert prove_bidirectional(make("bert")) == Proof(True, True, 0.0)


def test_a_refusal_is_remembered_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lie = Proof(False, True, 0.0)
    monkeypatch.setattr(module, "_prove", lambda _: lie)
    for _ in range(2):
        with pytest.raises(MismatchError):
            prove_bidirectional(make("bert"))
