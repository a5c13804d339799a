"""The card of a trained model, and what its folder declares of prompts and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gemb.files import atomic_write, read_json, write_json
from gemb.model.folder import read_folder
from gemb.recipe import resolved
from gemb.training.data_recipe import PromptText
from gemb.training.recipe import RunRecipe, TrainRecipe

_DECLARATIONS = "config_sentence_transformers.json"


def declare(folder: Path, recipe: TrainRecipe, sizes: Sequence[int]) -> None:
    """Let the model folder say which prompts and Matryoshka sizes it was trained with.

    Prompts that the recipe gives as texts become `query` and `document` where all data sets have the same and
    the model declares none of that name.
    """
    file = folder / _DECLARATIONS
    declared: dict[str, Any] = {"similarity_fn_name": "cosine"}
    if file.is_file():
        declared = read_json(file)
    prompts = dict(declared.get("prompts") or {})
    for name, role in (("query", "query"), ("document", "passage")):
        texts = {
            prompt.text
            for data in recipe.data
            if isinstance(prompt := getattr(data.prompts, role, None), PromptText)
        }
        if len(texts) == 1 and not prompts.get(name):
            prompts[name] = texts.pop()
    if prompts:
        declared["prompts"] = prompts
    if len(sizes) > 1:
        declared["matryoshka_dims"] = list(sizes)
    write_json(file, declared)


def write_card(folder: Path, recipe: TrainRecipe, record: Mapping[str, Any]) -> None:
    """Write README.md: what the model is, how to use it, what it was trained on, and what it reached."""
    head = yaml.safe_dump(
        {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "tags": ["sentence-transformers", "sentence-similarity", "feature-extraction", "gemb"],
            "base_model": record["model"]["name"],
        },
        sort_keys=False,
    )
    name = Path(str(record["output"])).name
    done = f"taught by {record['teacher']['name']}" if "teacher" in record else "trained further"
    parts = [
        f"---\n{head}---",
        f"# {name}",
        f"{record['model']['name']} {done} with gemb {record['versions']['gemb']}: "
        f"{record['pairs']:,} pairs, {record['steps']:,} steps, {record['tokens']:,} tokens.",
        _usage(folder, record),
        _qat(recipe, record),
        _scores(record),
        _data(recipe, record),
        *how_made(recipe, record),
    ]
    with atomic_write(folder / "README.md") as file:
        file.write(("\n\n".join(part for part in parts if part) + "\n").encode())


def how_made(recipe: RunRecipe, record: Mapping[str, Any]) -> list[str]:
    """The last parts of a card: the whole recipe, and what the model was made with."""
    return [
        "## Recipe",
        "```yaml\n" + yaml.safe_dump(resolved(recipe), sort_keys=False).rstrip() + "\n```",
        "## Made with",
        "\n".join([
            f"- device: {record['device']}",
            f"- seed: {recipe.seed}",
            *(f"- {package} {version}" for package, version in record["versions"].items()),
            f"- base model fingerprint {record['model']['fingerprint']}",
            "- the licences of the base model and of the data apply to this model as well",
        ]),
    ]  # fmt: skip


def _usage(folder: Path, record: Mapping[str, Any]) -> str:
    prompts = read_json(folder / _DECLARATIONS).get("prompts") or {}
    sizes = record["matryoshka_dims"]
    lines = [
        "## Use",
        _python(folder, str(record["output"])),
        f"```sh\ngemb embed docs.jsonl -o docs.npy --model {record['output']}\n```",
    ]
    if prompts:
        listed = "\n".join(f"- {name}: `{text}a text`" for name, text in prompts.items())
        lines.append(f"Prompts, each with an example:\n\n{listed}")
    if len(sizes) > 1:
        lines.append(f"Vectors may be cut to {', '.join(map(str, sizes[1:]))} dims and normalised again.")
    return "\n\n".join(lines)


def _python(folder: Path, output: str) -> str:
    if read_folder(folder).pooling.is_own:
        load, embed = "from gemb import Encoder\n\nmodel = Encoder.load", "embed"
        note = "\n\nsentence-transformers has no such pooling and refuses the folder; gemb runs it."
    else:
        load = "from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer"
        embed, note = "encode", ""
    call = f'vectors = model.{embed}(["a first text", "a second one"])'
    return f'```python\n{load}("{output}")\n{call}\n```{note}'


def _qat(recipe: TrainRecipe, record: Mapping[str, Any]) -> str:
    if recipe.qat is None:
        return ""
    return (
        f"Trained for the format {recipe.qat}; the scores below are those of the quantised model, but for "
        "those before. The weights here are in full precision:\n\n"
        f"```sh\ngemb quantize {record['output']} --format {recipe.qat.format} -o "
        f"{record['output']}-{recipe.qat.format}\n```"
    )


def _scores(record: Mapping[str, Any]) -> str:
    if not record["verdicts"]:
        return "## Scores\n\nNothing was evaluated."
    rows = [
        f"| {one['metric']} | {one['before']:.4f} | {one['after']:.4f} | "
        f"{one['low']:+.4f} to {one['high']:+.4f} | {one['word']} |"
        for one in record["verdicts"]
    ]
    head = "| measure | before | after | 95 % of the difference | verdict |\n| --- | --- | --- | --- | --- |"
    return "\n".join(["## Scores", "", head, *rows])


def _data(recipe: TrainRecipe, record: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    for data, (name, counts) in zip(recipe.data, record["data_counts"].items(), strict=True):
        lines.append(
            f"- {name}: {counts['examples']:,} examples, {counts['tokens']:,} tokens; prompts: "
            f"query {_shown(data.prompts.query)}, passage {_shown(data.prompts.passage)}"
        )
    return "\n".join(lines)


def _shown(prompt: str | PromptText) -> str:
    """The text of a prompt as code, or the name of one that the model has."""
    return f"`{prompt.text}`" if isinstance(prompt, PromptText) else prompt
