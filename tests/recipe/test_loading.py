"""Files, names, overrides and options to one recipe; every problem told at once, word for word."""

import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator

from gemb.errors import Exit, GembError
from gemb.recipe import (
    ComputeRecipe,
    ModelName,
    Origin,
    Recipe,
    RecipeInput,
    RecipePath,
    ShippedRecipe,
    json_schema,
    key_of,
    load,
    origin,
    resolved,
    shipped_recipes,
)
from gemb.recipe.document import parse


class Source(Recipe):
    """A part of a recipe."""

    path: RecipePath | None = None
    """The file."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, against the others."""


class Sample(ComputeRecipe):
    """A recipe with every kind of field."""

    kind = "sample"

    name: str
    """What the run is called. More is said here."""
    dims: int | None = Field(default=None, ge=1, le=4096)
    """Numbers kept of each vector."""
    temperature: float | Literal["auto"] = 0.05
    """Divides the cosine similarities."""
    normalise: bool = True
    """Make the vectors unit length."""
    data: tuple[Source, ...] = ()
    """What is read."""
    first: Source = Source()
    """What is read first."""
    inputs: tuple[RecipeInput, ...] = ()
    """Files to read."""
    folders: Mapping[str, RecipePath] = Field(default_factory=dict)
    """Named folders."""
    output: RecipePath = Path("out")
    """The folder to write."""
    as_: str | None = None
    """What the texts are."""
    teacher: ModelName = "minilm"
    """Another model."""

    @field_validator("name")
    @classmethod
    def _no_slash(cls, name: str) -> str:
        if "/" in name:
            raise ValueError(f"{name!r} has a slash; a name is one word")
        return name


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write recipes/mine.yaml below an empty working folder and give its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("recipes").mkdir(exist_ok=True)
        Path("recipes/mine.yaml").write_text(text, encoding="utf-8")
        return "recipes/mine.yaml"

    return write


def failure(source: str | None, *overrides: str, **options: object) -> str:
    with pytest.raises(GembError) as error:
        load(source, Sample, overrides, options)
    assert error.value.exit_code == Exit.USAGE
    return str(error.value)


def test_defaults_file_overrides_and_options_win_in_this_order(write: Callable[[str], str]) -> None:
    path = write("name: a\ndims: 1\nthreads: 1\nbatch_tokens: 1\n")
    recipe = load(path, Sample, ["threads=2", "batch_tokens=2"], {"batch_tokens": 3, "device": None})
    found = (recipe.device, recipe.dims, recipe.threads, recipe.batch_tokens)
    assert found == ("auto", 1, 2, 3)
    assert origin(recipe) == Origin("recipes/mine.yaml", ("threads", "batch_tokens", "batch_tokens"))


class Long(Recipe):
    """A recipe with two ways to say how long a run is."""

    kind = "long"
    alternatives = ("steps", "hours")

    steps: int | None = None
    """Steps."""
    hours: int | None = None
    """Hours."""


@pytest.mark.parametrize(
    ("overrides", "options", "found"),
    [
        ([], {}, (None, 9)),
        (["steps=3"], {}, (3, None)),
        ([], {"steps": 3}, (3, None)),
        (["hours=3"], {}, (None, 3)),
        (["steps=null"], {}, (None, 9)),
        (["hours=null"], {}, (None, None)),
        (["hours=null"], {"steps": 3}, (3, None)),
        (["steps=3", "hours=4"], {}, (3, 4)),  # for the recipe to refuse
    ],
)
def test_one_of_several_alternatives_on_the_command_line_takes_the_place_of_the_files(
    write: Callable[[str], str],
    overrides: list[str],
    options: dict[str, object],
    found: tuple[int | None, int | None],
) -> None:
    recipe = load(write("hours: 9\n"), Long, overrides, options)
    assert (recipe.steps, recipe.hours) == found


def test_a_recipe_made_in_python_equals_the_loaded_one(write: Callable[[str], str]) -> None:
    path = write("name: a\ntemperature: 1e-2\nnormalise: false\nfirst: {weight: 3}\n")
    made = Sample(name="a", temperature=0.01, normalise=False, first=Source(weight=3))
    assert resolved(load(path, Sample)) == resolved(made)
    assert origin(made) == Origin(None, ())


def test_the_resolved_recipe_loads_to_itself(write: Callable[[str], str]) -> None:
    recipe = load(write("name: a\ndata: [{weight: 0.5}]\ntemperature: auto\n"), Sample)
    again = load(write(json.dumps(resolved(recipe))), Sample)
    assert resolved(again) == {**resolved(recipe), "output": "recipes/out"}
    assert resolved(recipe)["kind"] == "sample"


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(write: Callable[[str], str]) -> None:
    path = write(
        "dims: '8'\ntemprature: 1\nfirst:\n  weigth: 1\n  weight: none\ndata:\n- weight: 0\n- 3\n"
        "precision: bf61\nthreads: 0\nnormalise: yes\ntemperature: b\ninputs: a.jsonl\nbatch_tokens: 1.5\n"
        "offline: 1\ndevice: 0\ndims: 9\n"
    )
    assert failure(path) == (
        "recipes/mine.yaml: 15 problems\n"
        "  name: missing: what the run is called\n"
        "  line 2: temprature: no such key; did you mean temperature?\n"
        "  line 4: first.weigth: no such key; did you mean weight?\n"
        "  line 5: first.weight: 'none' is not a number\n"
        "  line 7: data.0.weight: 0 is too small; more than 0\n"
        "  line 8: data.1: 3 is not a mapping\n"
        "  line 9: precision: 'bf61' is not one of auto, fp32, bf16; did you mean bf16?\n"
        "  line 10: threads: 0 is too small; at least 1\n"
        "  line 11: normalise: 'yes' is not true or false\n"
        "  line 12: temperature: 'b' is not a number and not one of auto\n"
        "  line 13: inputs: 'a.jsonl' is not a list\n"
        "  line 14: batch_tokens: 1.5 is not an int\n"
        "  line 15: offline: 1 is not true or false\n"
        "  line 16: device: 0 is not a text; quote it\n"
        "  line 17: dims: given twice; first on line 1"
    )


def test_a_key_that_stands_in_a_mapping_of_the_recipe_is_pointed_to(write: Callable[[str], str]) -> None:
    from gemb.training.recipe import TrainRecipe

    path = write("learning_rat: 1e-3\nsizes: [64]\nweights: [1]\nname: adamw\n")
    with pytest.raises(GembError) as error:
        load(path, TrainRecipe)
    lines = str(error.value).splitlines()
    assert lines[1:3] == [
        "  line 1: learning_rat: no such key; did you mean optimizer.learning_rate?",
        "  line 2: sizes: no such key; did you mean matryoshka.sizes?",
    ]
    assert lines[4].startswith("  line 4: name: no such key; the keys are "), "several mappings have it"


def test_problems_of_the_command_line_name_the_word_that_was_typed() -> None:
    message = failure(
        None, "dims=x", "data.0.weight=3", "first.weight.more=1", "dms=1", "normalise", "name=[a", threads=0
    )
    assert message == (
        "command line: 7 problems\n"
        "  data.0.weight: the recipe has no data, so there is no item to change\n"
        "  'normalise' is not key=value\n"
        "  name: not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'\n"
        "  --threads: 0 is too small; at least 1\n"
        "  dims: 'x' is not an int\n"
        "  first.weight: a mapping is not a number\n"
        "  dms: no such key; did you mean dims?"
    )


def test_a_validator_of_the_recipe_speaks_for_itself(write: Callable[[str], str]) -> None:
    assert failure(write("\nname: a/b\n")) == (
        "recipes/mine.yaml: 1 problem\n  line 2: name: 'a/b' has a slash; a name is one word"
    )


def test_an_unknown_key_without_a_close_one_lists_the_keys(write: Callable[[str], str]) -> None:
    assert failure(write("name: a\nfirst: {zzz: 1}\n")) == (
        "recipes/mine.yaml: 1 problem\n  line 2: first.zzz: no such key; the keys are path, weight"
    )


def test_a_long_value_is_cut_in_the_message(write: Callable[[str], str]) -> None:
    line = failure(write(f"name: a\ndims: {'x' * 500}\n")).splitlines()[1]
    assert line == f"  line 2: dims: '{'x' * 56}... is not an int"


def test_a_list_item_is_changed_by_its_number(write: Callable[[str], str]) -> None:
    path = write("name: a\ndata:\n- weight: 1\n- weight: 2\n")
    recipe = load(path, Sample, ["data.1.weight=1e-1", "first.weight=9"])
    assert [source.weight for source in recipe.data] == [1.0, 0.1]
    assert recipe.first.weight == 9
    assert failure(path, "data.2.weight=1") == (
        "recipes/mine.yaml: 1 problem\n  data.2.weight: data has 2 items, counted from 0; 2 is none"
    )
    assert failure(path, "name.x=1") == (
        "recipes/mine.yaml: 1 problem\n  name.x: name is 'a' and has no keys"
    )


def test_relative_paths_of_a_file_are_relative_to_the_file(write: Callable[[str], str]) -> None:
    path = write(
        "name: a\ninputs: [x.jsonl, '-', /abs/y.jsonl, 'd/*.txt']\noutput: ../o\nfirst: {path: p}\n"
        "data: [{path: q}, {}]\nmodel: ./enc\nteacher: org/model\nfolders: {k: v}\n"
    )
    recipe = load(path, Sample)
    assert recipe.inputs == ("recipes/x.jsonl", "-", "/abs/y.jsonl", "recipes/d/*.txt")
    assert recipe.output == Path("recipes/../o")
    assert recipe.first.path == Path("recipes/p")
    assert [source.path for source in recipe.data] == [Path("recipes/q"), None]
    assert (recipe.model, recipe.teacher) == ("recipes/enc", "org/model")
    assert recipe.folders == {"k": Path("recipes/v")}


def test_paths_of_the_command_line_and_defaults_stay_as_they_are(write: Callable[[str], str]) -> None:
    path = write("name: a\nfirst: {path: p}\ndata: [{path: q}]\n")
    options = {"inputs": ("x.jsonl",), "model": "./enc"}
    recipe = load(path, Sample, ["first.path=r", "data.0.path=s"], options)
    assert recipe.output == Path("out")
    assert recipe.inputs == ("x.jsonl",)
    assert recipe.model == "./enc"
    assert (recipe.first.path, recipe.data[0].path) == (Path("r"), Path("s"))


def test_a_home_folder_is_expanded(write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = load(write("name: a\noutput: ~/o\nmodel: ~/enc\n"), Sample)
    assert (recipe.output, recipe.model) == (Path("/home/ada/o"), "/home/ada/enc")


def test_only_what_was_given_counts_as_set(write: Callable[[str], str]) -> None:
    assert load(write("name: a\noutput: o\n"), Sample).model_fields_set == {"name", "output"}


def test_a_word_that_python_keeps_is_a_plain_key(write: Callable[[str], str]) -> None:
    recipe = load(write("name: a\nas: query\n"), Sample)
    assert recipe.as_ == "query"
    assert resolved(recipe)["as"] == "query"
    assert load(None, Sample, ["as=none"], {"name": "a"}).as_ == "none"
    assert load(None, Sample, [], {"name": "a", "as_": "document"}).as_ == "document"
    assert origin(load(None, Sample, [], {"name": "a", "as_": "document"})).overridden == ("name", "as")
    assert "as" in json_schema(Sample)["properties"]
    assert Sample(name="a", as_="query") == Sample.model_validate({"name": "a", "as": "query"})
    assert failure(None, "name=a", as_=3) == "--as: 3 is not a text; quote it"


def test_kind_may_be_left_out_and_must_fit_the_command(write: Callable[[str], str]) -> None:
    assert load(write("kind: sample\nname: a\n"), Sample).name == "a"
    assert failure(write("name: a\nkind: train\n")) == (
        "recipes/mine.yaml: 1 problem\n  line 2: kind: this is a recipe for gemb train, not for gemb sample"
    )


def test_broken_yaml_is_the_only_problem_told(write: Callable[[str], str]) -> None:
    assert failure(write("dims: [1\n")) == (
        "recipes/mine.yaml: 1 problem\n"
        "  line 2: not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"
    )


def test_a_file_that_is_not_utf_8_is_named_with_its_line(write: Callable[[str], str]) -> None:
    Path(write("")).write_bytes(b"name: a\n# caf\xe9\n")
    assert failure("recipes/mine.yaml") == "recipes/mine.yaml:2: not UTF-8 (byte 0xe9)"


def test_a_byte_order_mark_is_read_over(write: Callable[[str], str]) -> None:
    Path(write("")).write_bytes(b"\xef\xbb\xbfname: a\n")
    assert load("recipes/mine.yaml", Sample).name == "a"


def test_a_word_that_is_not_utf_8_is_a_problem() -> None:
    assert failure(None, name=os.fsdecode(b"caf\xe9")) == ("--name: 'caf\\udce9' is not UTF-8 text")


def test_stdin_is_read_for_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"name: a\noutput: o\n")))
    recipe = load("-", Sample)
    assert (recipe.output, origin(recipe).source) == (Path("o"), "stdin")


def test_a_shipped_recipe_is_found_by_name_and_its_paths_are_the_users(
    write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("")
    ours = [ShippedRecipe("family/quickstart", "# x - y\nname: a\noutput: o\n")]
    monkeypatch.setattr("gemb.recipe.loading.shipped_recipes", lambda: ours)
    assert load("family/quickstart", Sample).output == Path("o")
    assert failure("family/quickstrat") == (
        "no recipe family/quickstrat: neither a file nor a recipe of gemb; did you mean family/quickstart?"
    )
    assert failure("zzz") == (
        "no recipe zzz: neither a file nor a recipe of gemb; gemb recipes list shows the recipes of gemb"
    )
    assert failure("recipes") == "recipes is a folder, not a recipe file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(write: Callable[[str], str]) -> None:
    path = write("name: a\n")
    Path(path).chmod(0)
    assert failure(path) == "recipes/mine.yaml: cannot be read: permission denied"


def test_the_schema_describes_every_key_in_the_words_of_its_docstring() -> None:
    schema = json_schema(Sample)
    assert schema["properties"]["kind"]["const"] == "sample"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["dims"]["description"] == "Numbers kept of each vector."
    for model in (Sample, Source, ComputeRecipe):
        assert all(field.description for field in model.model_fields.values())


def test_every_shipped_recipe_says_what_it_does_and_how_to_run_it() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    on_disk = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    assert [recipe.name for recipe in shipped_recipes()] == on_disk
    for recipe in shipped_recipes():
        first, second, *_ = recipe.text.splitlines()
        assert first.startswith(f"# recipes/{recipe.name}.yaml - ")
        assert second.startswith("#   gemb ")
        assert recipe.name in second


@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_every_shipped_recipe_is_valid_and_repeats_no_default(name: str) -> None:
    (text,) = (recipe.text for recipe in shipped_recipes() if recipe.name == name)
    given = parse(text).values
    kind = given.pop("kind")
    job = import_module(f"gemb.jobs.{kind}")
    if kind == "train":
        model = job.recipe_for(given)
    else:
        (model,) = (
            value
            for value in vars(job).values()
            if isinstance(value, type) and issubclass(value, Recipe) and value.kind == kind
        )
    loaded = load(name, model)
    defaults = {key_of(field): info.default for field, info in model.model_fields.items()}
    assert [key for key in given if getattr(loaded, key, None) == defaults[key]] == []
