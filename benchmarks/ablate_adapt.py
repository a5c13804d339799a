"""What adapting and pretraining are worth: encoders of several beginnings, fine-tuned alike, three seeds.

An arm is a chain of stages, each a recipe in `ablations_adapt/` with what the arm changes of it; a comparison
is some arms that differ in one stage. The decoder that the arms begin with is trained once and kept in the
cache, and so is a stage that several arms share: some five minutes on one core. Every arm and seed takes 1 to
1.5 minutes and adds one line to `results/ablations-adapt.jsonl`, so that a rerun does only what is missing.
Needs `../shared/data`.

    python -m benchmarks.ablate_adapt                      everything that is missing
    python -m benchmarks.ablate_adapt --arm ul2 --seed 1
    python -m benchmarks.ablate_adapt --table              only the table, from what is there
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import typer

from benchmarks import ablate
from benchmarks.machine import this_machine
from benchmarks.models import cache_folder
from gemb.files import atomic_write

STAGES = ablate.FOLDER / "ablations_adapt"
LINES = ablate.FOLDER / "results" / "ablations-adapt.jsonl"
TABLE = ablate.FOLDER / "results" / "ablations-adapt.md"
SEEDS = (1, 2, 3)


class Stage(NamedTuple):
    """A recipe by name, with keys that are changed; `untrained` stands for random weights."""

    recipe: str
    changes: tuple[str, ...] = ()


DECODER = Stage("decoder")
UNTRAINED = Stage("decoder", ("untrained",))
"""The decoder of the same shape and tokenizer, before its training."""
ENCODER = Stage("encoder")
ENCODER_DECODER = Stage("encoder_decoder")
PAIRS = Stage("pairs")

_POOLINGS: Mapping[str, tuple[str, ...]] = {
    "mean": (),
    "first_k": ("pooling=first-k", "pool_tokens=4"),
    "last_k": ("pooling=last-k", "pool_tokens=4"),
    "attention": ("pooling=attention-query",),
}
_DROPOUT = "dropout=0.1"

ARMS: Mapping[str, tuple[Stage, ...]] = {
    "random": (UNTRAINED, ENCODER, PAIRS),
    "decoder": (DECODER, ENCODER, PAIRS),
    "more_causal": (DECODER, Stage("causal"), ENCODER, PAIRS),
    "ul2": (DECODER, ENCODER_DECODER, Stage("ul2"), ENCODER, PAIRS),
    "prefix_lm": (DECODER, ENCODER_DECODER, Stage("prefix_lm"), ENCODER, PAIRS),
    "causal_attention": (DECODER, Stage("encoder", ("attention=causal",)), PAIRS),
    "causal_attention_last": (
        DECODER,
        Stage("encoder", ("attention=causal", "pooling=lasttoken")),
        PAIRS,
    ),
    **{
        f"{pooling}{suffix}": (DECODER, Stage("encoder", changes), Stage("pairs", dropout))
        for pooling, changes in _POOLINGS.items()
        for suffix, dropout in (("", ()), ("_dropout", (_DROPOUT,)))
        if (pooling, suffix) != ("mean", "")  # that is the arm `decoder`
    },
}
"""Chains of stages by the name of the arm."""

COMPARISONS = (
    ablate.Comparison("Beginning", ("random", "decoder", "more_causal", "ul2")),
    ablate.Comparison("Objective of the encoder-decoder", ("prefix_lm", "ul2")),
    ablate.Comparison("Attention", ("causal_attention", "causal_attention_last", "decoder")),
    ablate.Comparison("Pooling", ("decoder", "first_k", "last_k", "attention")),
    ablate.Comparison(
        "Pooling with dropout",
        ("mean_dropout", "first_k_dropout", "last_k_dropout", "attention_dropout"),
    ),
)


def digest_of(stages: Sequence[Stage]) -> str:
    """What tells a chain from a changed one."""
    digest = blake2b(digest_size=6)
    for stage in stages:
        digest.update((STAGES / f"{stage.recipe}.yaml").read_bytes())
        digest.update("\0".join(stage.changes).encode() + b"\0")
    return digest.hexdigest()


def finished() -> dict[ablate.Run, dict[str, Any]]:
    """The lines that are there, by arm and seed; those of other chains are left out."""
    return ablate.lines_in(LINES, {arm: digest_of(chain) for arm, chain in ARMS.items()})


def wanted() -> Iterator[ablate.Run]:
    """Every arm with every seed, all arms with the first seed before the next one."""
    return ((arm, seed) for seed in SEEDS for arm in ARMS)


def run_arm(arm: str, seed: int) -> dict[str, object]:
    """Make the model of one arm with one seed and measure it; gives its line.

    What was killed goes on where it was.
    """
    from gemb.jobs.train import TrainRecipe
    from gemb.recipe import load

    began = time.monotonic()
    chain = ARMS[arm]
    for end in range(1, len(chain)):
        made(chain[:end], seed)
    folder, data = made(chain, seed)
    sets = load(STAGES / f"{PAIRS.recipe}.yaml", TrainRecipe).evaluation.sets
    return {
        "arm": arm,
        "seed": seed,
        "recipe": digest_of(chain),
        "measures": ablate.measures(folder, sets),
        "steps": data["steps"],
        "tokens": data["tokens"],
        "train_seconds": data["step_seconds"],
        "seconds": round(time.monotonic() - began, 1),
        "machine": this_machine().slug,
        "versions": data["versions"],
    }


def folder_of(chain: Sequence[Stage], seed: int) -> Path:
    """Where the model of a chain is; the decoder is the same for all seeds."""
    name = chain[-1].recipe
    own = 0 if tuple(chain) == (DECODER,) else seed
    return cache_folder() / "adapt" / f"{name}-{own}-{digest_of(chain)}"


def made(chain: Sequence[Stage], seed: int) -> tuple[Path, Mapping[str, Any]]:
    """(folder, gemb.json or nothing) of the model of a chain, made of the one before unless it is there."""
    from gemb.files import read_json
    from gemb.jobs import adapt, pretrain, train
    from gemb.recipe import load

    output, stage = folder_of(chain, seed), chain[-1]
    if stage == UNTRAINED:
        return untrained(output, seed), {}
    record = output / "gemb.json"
    if output.is_dir():
        return output, read_json(record) if record.is_file() else {}
    source = STAGES / f"{stage.recipe}.yaml"
    is_adapted = "kind: adapt\n" in source.read_text(encoding="utf-8")
    options: dict[str, Any] = {"output": output, "seed": SEEDS[0] if stage == DECODER else seed}
    if len(chain) > 1:
        options["source" if is_adapted else "model"] = str(folder_of(chain[:-1], seed))
    if is_adapted:
        adapt.run(load(source, adapt.AdaptRecipe, stage.changes, options))
        return output, {}
    options |= {"threads": 1, "precision": "fp32"}
    if stage.recipe == PAIRS.recipe:
        recipe = load(source, train.TrainRecipe, stage.changes, options)
        # They are measured once, at the end.
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"sets": ()})})
        return output, train.run(recipe).data
    return output, pretrain.run(load(source, pretrain.PretrainRecipe, stage.changes, options)).data


def untrained(output: Path, seed: int) -> Path:
    """The trained decoder's folder with random weights in their place."""
    from safetensors.torch import save_file

    from gemb.files import read_json
    from gemb.jobs.quickstart import random_gemma3

    if not output.is_dir():
        trained, _ = made((DECODER,), seed)
        draft = output.with_name(f"{output.name}.partial")
        shutil.copytree(trained, draft, ignore=shutil.ignore_patterns("run", "gemb.json"), dirs_exist_ok=True)
        config = read_json(draft / "config.json")
        weights = random_gemma3(config, config["vocab_size"], seed)
        named = {f"model.{name}": one for name, one in weights.items()}
        save_file(named, draft / "model.safetensors", metadata={"format": "pt"})
        draft.rename(output)
    return output


def table(lines: Mapping[ablate.Run, Mapping[str, Any]]) -> str:
    """The Markdown page of what is there."""
    about = (
        "Mean ± standard deviation over seeds; `n` is how many there are. Small models, the same pairs for "
        "all arms. Made by `python -m benchmarks.ablate_adapt` from the chains of recipes in "
        "`benchmarks/ablations_adapt`."
    )
    sections = (text for one in COMPARISONS for text in ablate.section(one, lines))
    return ablate.page("Adapting and pretraining", about, lines, wanted(), sections)


def main(
    arm: ablate.ArmOption = None, seed: ablate.SeedOption = None, only_table: ablate.TableOption = False
) -> None:
    """Run the arms and seeds that are missing, then write the table."""
    for name, number in () if only_table else ablate.missing(wanted(), finished, arm, seed):
        line = run_arm(name, number)
        ablate.append(line, LINES)
        shutil.rmtree(folder_of(ARMS[name], number), ignore_errors=True)
        print(f"{name} {number}: {line['seconds']} s, {line['measures']}")
    with atomic_write(TABLE) as file:
        file.write(table(finished()).encode())


if __name__ == "__main__":
    typer.run(main)
