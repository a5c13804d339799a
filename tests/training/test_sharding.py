"""Ranks that share out the optimizer's states and the averages have those of one rank, to the bit."""

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException

from gemb.training.batches import TrainingBatch
from gemb.training.checkpoints import Checkpoints
from gemb.training.gradients import EmbeddingGradients, MemoryPlan
from gemb.training.loop import Computation, Hooks, Length, Progress, StepReport, Training
from gemb.training.optimizers import (
    LastAverage,
    MovingAverage,
    OptimizerName,
    clip_gradients,
    make_optimizer,
)
from gemb.training.random_numbers import seeded
from gemb.training.ranks import Ranks
from gemb.training.recipe import ContrastiveTerm
from gemb.training.sharding import ShardedAverage, ShardedOptimizer, Shards, Stateful, deal
from gemb.training.terms import Loss
from tests.training.fakes import ListedBatches, SparseEncoder, TinyEncoder, on_ranks

STEPS, EVERY, LATE = 6, 2, 3
KINDS = ("adamw", "muon", "sparse", "odd")
SUMMED = ("muon", "sparse")


class OddEncoder(TinyEncoder):
    """One parameter is frozen, one is a number, and one learns only from step `LATE` on."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(8))
        self.inner.requires_grad_(False)

    def forward(
        self, ids: Tensor, lengths: NDArray[np.int32], prompt_tokens: NDArray[np.int32] | None = None
    ) -> Tensor:
        """Scaled and shifted."""
        return super().forward(ids, lengths, prompt_tokens) * self.scale + self.shift


def training(ranks: Ranks, folder: Path, kind: str, shared: Ranks, summed: Ranks) -> Training[TrainingBatch]:
    """A run in `folder`, opened where its last checkpoint is; states are shared out by `shared`.

    `summed` are the ranks that encode a batch together; each encodes the whole where it is a lone one.
    """
    kinds = {"sparse": SparseEncoder, "odd": OddEncoder}
    encoder = kinds.get(kind, TinyEncoder)(dropout=0.0 if summed.count > 1 else 0.2)
    named = [(name, one) for name, one in encoder.named_parameters() if one.requires_grad]
    parameters = [one for _, one in named]
    name: OptimizerName = "muon" if kind in ("muon", "odd") else "adamw"
    optimizer = make_optimizer(named, name, learning_rate=0.02, tables=("table",))
    shards = Shards(named, optimizer.param_groups, shared)
    pieces = shards.pieces.items()
    average = LastAverage(pieces, 3) if kind in ("adamw", "odd") else MovingAverage(pieces, 0.9)
    loss = Loss((ContrastiveTerm(name="contrastive"),), (8, 4), (1.0, 1.0))
    compute = EmbeddingGradients(encoder, parameters, loss, ranks=summed)

    def learn(batch: TrainingBatch, step: int) -> Computation:
        if kind == "odd":
            encoder.outer.requires_grad_(step >= LATE)
        return compute(batch, step)

    checkpoints = Checkpoints(folder / kind, keep=STEPS)
    steps = checkpoints.steps()
    progress = Progress.from_json(checkpoints.state(steps[-1])) if steps else Progress(MemoryPlan(30, 30))
    made = Training(
        model=encoder,
        parameters=parameters,
        optimizer=ShardedOptimizer(optimizer, shards),
        learn=learn,
        batches=ListedBatches(STEPS, progress.position or 0),
        length=Length(steps=STEPS),
        rate=lambda share: 1 - share / 2,
        clip=lambda parameters: clip_gradients(parameters, 0.5),
        checkpoints=checkpoints,
        metrics=None,
        progress=progress,
        average=ShardedAverage(average, shards),
        ranks=ranks,
        checkpoint_every=EVERY,
    )
    if steps:
        made.restore(steps[-1])
    return made


def train(ranks: Ranks, folder: Path, hooks: Hooks | None = None, kinds: Sequence[str] = KINDS) -> None:
    """Some kinds to the end, every rank with the gradients of whole batches."""
    for kind in kinds:
        with seeded(5, "cpu"):
            made = training(ranks, folder, kind, shared=ranks, summed=Ranks())
            made.hooks = hooks or Hooks()
            made.run(threading.Event())
        average = made.average
        assert isinstance(average, ShardedAverage)
        with average.applied():
            values = {name: value.clone() for name, value in made.model.state_dict().items()}
        torch.save([values, made.model.state_dict()], folder / f"{kind}-{ranks.index}.pt")


def train_summed(ranks: Ranks, folder: Path) -> None:
    """Some kinds to the end, gradients summed over the ranks; states of rows, or all on every rank."""
    for kind in SUMMED:
        for name, shared in (("shared", ranks), ("whole", Ranks())):
            made = training(ranks, folder / name, kind, shared=shared, summed=ranks)
            made.run(threading.Event())
            torch.save(made.model.state_dict(), folder / name / f"{kind}-{ranks.index}.pt")


def large_parameters() -> dict[str, nn.Parameter]:
    """Of a table, twelve matrices of two shapes, and vectors; 0."""
    shapes: dict[str, tuple[int, ...]] = {"table": (6000, 64)}
    for layer in range(6):
        shapes |= {f"{layer}.up": (256, 64), f"{layer}.down": (64, 256), f"{layer}.norm": (64,)}
    return {name: nn.Parameter(torch.zeros(*shape)) for name, shape in shapes.items()}


def measure(ranks: Ranks, folder: Path) -> None:
    """Bytes that a rank keeps after a step, for AdamW and Muon, and for an average."""
    found = []
    names: tuple[OptimizerName, ...] = ("adamw", "muon")
    for name in names:
        named = large_parameters()
        optimizer = make_optimizer(named.items(), name, learning_rate=0.1, tables=("table",))
        shards = Shards(named.items(), optimizer.param_groups, ranks)
        sharded = ShardedOptimizer(optimizer, shards)
        average = LastAverage(shards.pieces.items(), 2)
        for one in named.values():
            one.grad = torch.ones_like(one)
        sharded.step()
        average.update()
        average.update()
        states = [one for state in optimizer.state.values() for one in state.values()]
        assert all(float(one.detach().abs().min()) > 0 for one in named.values())  # changed everywhere
        found += [bytes_of(states), bytes_of(average.state_dict().values())]
    (folder / f"bytes-{ranks.count}-{ranks.index}").write_text(" ".join(map(str, found)), "utf-8")


def bytes_of(tensors: Any) -> int:  # noqa: ANN401
    """What the numbers take, each memory counted once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def on_two(ranks: Ranks, folder: Path) -> None:
    """What the tests below look at."""
    train(ranks, folder / "two")
    train_summed(ranks, folder / "summed by two")
    measure(ranks, folder)


def on_three(ranks: Ranks, folder: Path) -> None:
    """The same with three."""
    train(ranks, folder / "three")
    train(ranks, folder / "one, then three")
    train(ranks, folder / "two, then three")
    train_summed(ranks, folder / "summed by three")
    measure(ranks, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one, two and three ranks, and some that go on with another number at the first checkpoint."""
    folder = tmp_path_factory.mktemp("runs")

    def begun(name: str, by: str) -> None:
        for kind in KINDS:
            shutil.copytree(
                folder / by / kind / f"step-{EVERY:08d}", folder / name / kind / f"step-{EVERY:08d}"
            )

    for name in ("one", "two", "three"):
        (folder / name).mkdir()
    for name in ("two", "three"):
        for kept in ("shared", "whole"):
            (folder / f"summed by {name}" / kept).mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(Ranks(), folder / "one")
    on_ranks(2, on_two, folder)
    begun("one, then three", "one")
    begun("two, then three", "two")
    on_ranks(3, on_three, folder)
    begun("three, then one", "three")
    train(Ranks(), folder / "three, then one")
    measure(Ranks(), folder)
    torch.set_num_threads(threads)
    return folder


def weights(folder: Path, kind: str) -> Iterator[list[dict[str, Tensor]]]:
    """(averages, weights) that each rank ended with."""
    for path in sorted(folder.glob(f"{kind}-*.pt")):
        yield torch.load(path)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(one, second[name]) for name, one in first.items()
    )


NAMES = ("two", "three", "one, then three", "two, then three", "three, then one")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_ranks_ends_with_the_weights_and_averages_of_one_to_the_bit(
    runs: Path, name: str, kind: str
) -> None:
    [[averages, last]] = weights(runs / "one", kind)
    assert not equal(averages, last)
    found = list(weights(runs / name, kind))
    assert len(found) == {"one": 1, "two": 2, "three": 3}[name.split()[-1]]
    for own_averages, own in found:
        assert equal(own, last)
        assert equal(own_averages, averages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_the_files_of_one_rank(runs: Path, name: str, kind: str) -> None:
    expected, found = Checkpoints(runs / "one" / kind), Checkpoints(runs / name / kind)
    assert found.steps() == expected.steps() == [2, 4, 6]
    for step in found.steps():
        for file in ("weights", "optimizer", "average", "random"):
            path = f"{file}.safetensors"
            assert (found.path(step) / path).read_bytes() == (expected.path(step) / path).read_bytes(), path
        own, one = found.state(step), expected.state(step)
        for state in (own, one):
            state["seconds"] = 0
            # The states of parameters stand in the order of the ranks that keep them.
            [(_, states), _] = state["optimizer"]["items"]
            states["items"] = sorted((place, sorted(state["items"])) for place, state in states["items"])
        assert own == one


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("count", ["two", "three"])
def test_summed_gradients_give_the_same_whoever_keeps_the_states(runs: Path, count: str, kind: str) -> None:
    folder = runs / f"summed by {count}"
    first, *others = [torch.load(path) for path in sorted((folder / "shared").glob(f"{kind}-*.pt"))]
    others += [torch.load(path) for path in sorted((folder / "whole").glob(f"{kind}-*.pt"))]
    assert len(others) == {"two": 3, "three": 5}[count]
    assert all(equal(first, other) for other in others)


def test_each_rank_keeps_its_share_of_the_bytes(runs: Path) -> None:
    numbers = sum(one.numel() for one in large_parameters().values())
    matrices = 12 * 256 * 64
    [whole] = kept(runs, 1)
    # 4 bytes a number: two moments of AdamW, one of Muon, two copies; and a step count for each of AdamW's.
    assert whole == [8 * numbers + 19 * 4, 8 * numbers, 8 * numbers - 4 * matrices + 7 * 4, 8 * numbers]
    for count in (2, 3):
        found = kept(runs, count)
        assert len(found) == count
        for ranks, total in zip(zip(*found, strict=True), whole, strict=True):
            # A parameter that is cut has its step count on every rank.
            assert total <= sum(ranks) <= total + 4 * 19 * (count - 1)
            assert max(ranks) < 1.05 * total / count


def kept(runs: Path, count: int) -> list[list[int]]:
    paths = sorted(runs.glob(f"bytes-{count}-*"))
    return [[int(number) for number in path.read_text("utf-8").split()] for path in paths]


# --- a rank that is killed


def train_and_die(ranks: Ranks, folder: Path) -> None:
    """The second rank is killed when it gives its states to the second checkpoint."""

    def killed(report: StepReport) -> None:
        if report.progress.step == 2 * EVERY and ranks.index == 1:
            collect = ranks.collect

            def dying(own: Any) -> Any:  # noqa: ANN401
                os.kill(os.getpid(), signal.SIGKILL)
                return collect(own)

            ranks.collect = dying  # type: ignore[method-assign]

    train(ranks, folder, Hooks(on_step=killed), ["sparse"])


def test_a_rank_killed_while_a_checkpoint_is_gathered_leaves_the_one_before(
    runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(2, train_and_die, tmp_path)
    assert Checkpoints(tmp_path / "sparse").steps() == [EVERY]
    train(Ranks(), tmp_path, kinds=["sparse"])
    [[_, expected]], [[_, found]] = weights(runs / "one", "sparse"), weights(tmp_path, "sparse")
    assert equal(found, expected)


# --- who keeps what

Shapes = list[Stateful]


def gemma_300m() -> Shapes:
    """EmbeddingGemma: two thirds of the numbers are the token table's."""
    layer = [(768, 768), (256, 768), (256, 768), (768, 768), (1152, 768), (1152, 768), (768, 1152)]
    vectors = [Stateful(768, 2 * 768, True)] * 6
    matrices = [Stateful(rows, 2 * rows * width, True) for rows, width in layer]
    return [Stateful(262_144, 2 * 262_144 * 768, True), *(24 * (matrices + vectors))]


def decoder_4b(bytes_of_matrix: int) -> Shapes:
    """Qwen3's 4 B; its matrices by AdamW (2 numbers each) or Muon (1)."""
    layer = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]
    matrices = [Stateful(rows, bytes_of_matrix * rows * width, bytes_of_matrix == 2) for rows, width in layer]
    return [
        Stateful(151_936, 2 * 151_936 * 2560, True),
        *(36 * (matrices + [Stateful(2560, 5120, True)] * 4)),
    ]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "shapes", [gemma_300m, lambda: decoder_4b(2), lambda: decoder_4b(1)], ids=["300m", "4b", "4b by muon"]
)
def test_states_of_real_models_are_dealt_out_evenly(shapes: Callable[[], Shapes], count: int) -> None:
    parameters = shapes()
    loads = np.zeros(count)
    for one, bounds in zip(parameters, deal(parameters, count), strict=True):
        assert (bounds[0], bounds[-1], len(bounds)) == (0, one.rows, count + 1)
        spans = np.diff(bounds)
        assert spans.min() >= 0
        assert one.can_be_cut or np.count_nonzero(spans) == 1
        loads += spans * (one.numbers / one.rows)
    assert loads.sum() == sum(one.numbers for one in parameters)
    assert loads.max() / loads.mean() < 1.01


def test_what_is_cut_is_cut_at_whole_vectors_of_numbers() -> None:
    bounds = deal([Stateful(1000, 1000, True), Stateful(7, 7, True)], 3)
    assert bounds == [[0, 336, 672, 1000], [0, 0, 0, 7]]


def test_a_lone_rank_keeps_the_parameters_themselves() -> None:
    named = large_parameters()
    optimizer = make_optimizer(named.items(), learning_rate=0.1)
    shards = Shards(named.items(), optimizer.param_groups, Ranks())
    assert all(shards.pieces[name] is one for name, one in named.items())


def test_pieces_follow_parameters_that_move_in_memory() -> None:
    named = large_parameters()
    optimizer = make_optimizer(named.items(), learning_rate=0.1)
    shards = Shards(named.items(), optimizer.param_groups, Ranks(1, 2))
    piece = shards.pieces["table"]
    named["table"].data = torch.ones(6000, 64)
    assert float(piece.detach().sum()) == 0
    shards.refresh()
    assert piece is shards.pieces["table"]
    assert float(piece.detach().sum()) == 2992 * 64
