"""Two ranks of `gemb train` give the model that one gives, whoever keeps the optimizer's states."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import spawn

from gemb.jobs.train import TrainRecipe, run
from gemb.recipe import load
from gemb.training.loop import Training
from gemb.training.ranks import Ranks
from gemb.training.sharding import Shards
from tests.jobs.test_train import RECIPE, same, weights, write_pairs
from tests.models import tiny_folder

ARMS = {
    "best": ["evaluation.every=2", "checkpoint.result=best"],
    "low rank": ["evaluation.pairs=[]", "lora={rank: 4}", "ema=null", "average={name: last, checkpoints: 2}"],
    "for int4": ["evaluation.pairs=[]", "qat={format: int4}", "optimizer.name=muon"],
}


def train_one_rank(
    index: int, count: int, port: int, recipe: Path, output: Path, changes: Sequence[str] = ()
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run(load(recipe, TrainRecipe, changes, {"output": output}))


AFTER_STEP = Training._after_step


class Halt(Exception):
    """The process is gone."""


def after_step(self: Training[Any]) -> None:
    """Ends the run after the third step, before anything else happens."""
    if self.progress.step == 3:
        raise Halt
    AFTER_STEP(self)


def whole(named: Any, groups: Any, ranks: Ranks) -> Shards:  # noqa: ANN401  # as Shards
    """Everything is kept on every rank."""
    del ranks
    return Shards(named, groups, Ranks())


def train_all_arms(index: int, count: int, ports: Sequence[int], recipe: Path, target: Path) -> None:
    """Each arm with shared states, once to the end and once killed in between, and with all on every rank."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    left = iter(ports)
    for arm, changes in ARMS.items():
        train_one_rank(index, count, next(left), recipe, target / arm / "shared", changes)
        with mock.patch.object(Training, "_after_step", after_step), pytest.raises(Halt):
            train_one_rank(index, count, next(left), recipe, target / arm / "resumed", changes)
        train_one_rank(index, count, next(left), recipe, target / arm / "resumed", changes)
        with mock.patch("gemb.training.run_session.Shards", whole):
            train_one_rank(index, count, next(left), recipe, target / arm / "whole", changes)


@pytest.mark.slow
def test_shared_states_change_nothing_in_any_kind_of_run(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "base", "gemma3", dense=[{"out_features": 96}, {"out_features": 64}])
    write_pairs(tmp_path / "pairs.jsonl")
    write_pairs(tmp_path / "held-out.jsonl", 20, seed=1)
    recipe = tmp_path / "r.yaml"
    text = RECIPE.replace("matryoshka: {sizes: [32]}\n", "").replace("steps: 7", "steps: 4")
    text = text.replace("every: 3", "every: 2")
    text = text.replace("dropout: 0.1", "dropout: 0.0")  # each rank draws its own, the first one's are kept
    recipe.write_text(text, "utf-8")
    # Where the ranks of each run meet, kept here as by torchrun.
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(4 * len(ARMS))]
    ports = [store.port for store in stores]
    spawn(train_all_arms, args=(2, ports, recipe, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    for arm in ARMS:
        for name in ("shared", "resumed"):
            assert same(tmp_path / arm / name, tmp_path / arm / "whole"), (arm, name)


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
