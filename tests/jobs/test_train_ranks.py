"""Two ranks of `gemb train` give the model that one gives."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from gemb.jobs.train import TrainRecipe, run
from gemb.recipe import load
from tests.jobs.test_train import RECIPE, weights, write_pairs
from tests.models import tiny_folder


def train_one_rank(index: int, count: int, port: int, recipe: Path, output: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run(load(recipe, TrainRecipe, (), {"output": output}))


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base", "gemma3")
    write_pairs(tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "held-out.jsonl", 20, seed=1)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.replace("dropout: 0.1\n", ""), "utf-8")
    run(load(recipe, TrainRecipe, (), {"output": tmp_path / "one"}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(train_one_rank, args=(2, port, recipe, tmp_path / "two"), nprocs=2)  # type: ignore[no-untyped-call]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        # Seven steps of AdamW, which divides by the root of small numbers: sums in another order show.
        torch.testing.assert_close(two[name], expected, rtol=2e-4, atol=2e-5, msg=name)
