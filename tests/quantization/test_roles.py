"""Which weights go onto which grid, by family."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from gemb.quantization.grids import INT4_ROW, INT8_ROW, Q4_0, Q8_0
from gemb.quantization.roles import Role, grid_of, role_of

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
STAY = {"position_embeddings", "token_type_embeddings", "pooler"}


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward"),
    [("gemma3_text", 4, 3), ("llama", 4, 3), ("qwen3", 4, 3), ("bert", 4, 2), ("roberta", 4, 2),
     ("modernbert", 2, 2)],
)  # fmt: skip
def test_every_matrix_of_a_family_has_its_role(family: str, attention: int, feed_forward: int) -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **SMALL)
        weights = AutoModel.from_config(config).state_dict()  # type: ignore[no-untyped-call]
    found: dict[Role, int] = {}
    for name, weight in weights.items():
        role = role_of(name, weight.shape)
        if role is None:
            assert weight.ndim == 1 or STAY & set(name.split("."))
        else:
            found[role] = found.get(role, 0) + 1
    assert found == {"embedding": 1, "attention": 2 * attention, "feed_forward": 2 * feed_forward}


def test_a_dense_module_is_a_projection_and_its_bias_is_not() -> None:
    assert role_of("linear.weight", (64, 32)) == "projection"
    assert role_of("linear.bias", (64,)) is None


def test_mixed_has_attention_in_8_bits_and_the_rest_in_4() -> None:
    roles: list[Role] = ["embedding", "attention", "feed_forward", "projection"]
    assert [grid_of(role, "mixed") for role in roles] == [INT4_ROW, INT8_ROW, INT4_ROW, INT4_ROW]
    assert {grid_of(role, "int4") for role in roles} == {Q4_0}
    assert {grid_of(role, "int8") for role in roles} == {Q8_0}
