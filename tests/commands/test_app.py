"""The command line as a whole: help, laziness, and the rules that every command follows."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gemb.recipe import ComputeRecipe
from tests.conftest import ROOT, Finished, modules_after

commands = import_module("gemb.commands")

HEAVY = {"torch", "transformers", "tokenizers", "usearch", "pyarrow", "numpy", "rich", "yaml", "pydantic"}


def every_command() -> Iterator[tuple[str, Any]]:
    """Path and command of every leaf and group below `gemb`."""

    def below(path: str, command: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from below(f"{path} {name}", child)

    for name in commands.COMMANDS:
        yield from below(name, commands.load_command(name))


EVERY = dict(every_command())


def test_every_module_in_commands_is_listed_and_the_other_way_round() -> None:
    modules = {path.stem for path in (ROOT / "commands").glob("*.py") if not path.stem.startswith("_")}
    assert modules == set(commands.COMMANDS)


@pytest.mark.parametrize("path", EVERY)
def test_the_help_of_a_command_opens_with_a_sentence_and_an_example(
    path: str, gemb: Callable[..., Finished]
) -> None:
    done = gemb(*path.split(), "--help")
    assert (done.code, done.err) == (0, "")
    usage, _, sentence, _, example, *_ = done.out.splitlines()
    assert usage.startswith(f"Usage: gemb {path} ")
    assert re.fullmatch(r"  [A-Z].*\.", sentence), sentence
    assert example.startswith(f"  Example: gemb {path.split()[0]}"), example
    assert len(example) <= 80


@pytest.mark.parametrize("group", ["", "index", "recipes"])
def test_a_narrow_terminal_gets_the_sentences_of_all_commands_whole(
    group: str, gemb: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    shown = " ".join(gemb(*group.split(), "--help").out.partition("Commands:")[2].split())
    assert "..." not in shown
    for path, command in EVERY.items():
        if path.rpartition(" ")[0] == group:
            assert command.help.split("\n\n")[0].replace("\n", " ") in shown


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_of_itself(name: str) -> None:
    assert EVERY[name].help.split("\n\n")[0].replace("\n", " ") == commands.COMMANDS[name]


@pytest.mark.parametrize("path", EVERY)
def test_a_wrong_option_is_one_message_and_code_2(path: str, gemb: Callable[..., Finished]) -> None:
    done = gemb(*path.split(), "--no-such-thing")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"gemb: {path}: no such option: --no-such-thing; see gemb {path} --help\n"


def test_the_same_option_has_one_letter_default_and_set_of_choices_everywhere() -> None:
    seen: dict[str, tuple[str, object]] = {}
    for path, command in EVERY.items():
        for parameter in command.params:
            # embed writes types that an index does not keep; search has formats of hits, quantize of weights,
            # whose graph has weights of a kind, where an index has a graph or none
            own = {"--dtype", "--format", "--onnx"}
            if parameter.param_type_name != "option" or own & set(parameter.opts):
                continue
            assert parameter.help, f"{path} {parameter.opts} is not explained"
            long = max(parameter.opts, key=len)
            letter = [name for name in parameter.opts if not name.startswith("--")]
            default = parameter.help.partition("  [default: ")[2]
            about = (
                letter,
                "" if long == "--as" else default,
                parameter.metavar,
            )  # search asks, embed stores
            first_path, first = seen.setdefault(long, (path, about))
            assert about == first, f"{long} differs in {first_path} and {path}"


@pytest.mark.parametrize("path", EVERY)
def test_options_of_a_recipe_are_explained_by_the_recipe(path: str) -> None:
    for parameter in EVERY[path].params:
        field = ComputeRecipe.model_fields.get(parameter.name)
        if field is not None and parameter.param_type_name == "option":
            words = " ".join((field.description or "").replace("`", "").split())
            assert parameter.help.partition("  [default")[0] == words


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after(
        "from importlib import import_module\n"
        "try: import_module('gemb.commands').main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0"
    )
    assert loaded & HEAVY == set()
    assert "typer" in loaded


@pytest.mark.parametrize("statement", ["import gemb", "import gemb; gemb.__version__"])
def test_importing_gemb_loads_nothing_heavy(statement: str) -> None:
    assert modules_after(statement) & (HEAVY | {"typer"}) == set()


@pytest.mark.parametrize("path", EVERY)
def test_the_help_of_a_command_loads_no_torch_and_no_transformers(path: str) -> None:
    loaded = modules_after(
        "from importlib import import_module\n"
        f"try: import_module('gemb.commands').main({[*path.split(), '--help']!r})\n"
        "except SystemExit as stop: assert stop.code == 0"
    )
    assert loaded & {"torch", "transformers", "usearch"} == set()


@pytest.mark.parametrize(
    "room",
    ["text", "vectors", "files", "device", "recipe", "report", "errors", "engine", "jobs", "model.folder",
     "model.hub"],
)  # fmt: skip
def test_a_light_room_loads_no_torch_and_no_transformers(room: str) -> None:
    folder = ROOT / "gemb" / room.replace(".", "/")
    modules = [f"gemb.{room}"] + [f"gemb.{room}.{path.stem}" for path in folder.glob("[a-z]*.py")]
    loaded = modules_after("\n".join(f"import {module}" for module in modules))
    assert loaded & {"torch", "transformers", "sentence_transformers"} == set()


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:  # of the processor, so that a busy machine does not matter
        before = os.times()
        subprocess.run([sys.executable, "-m", "gemb", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.5


def test_the_version_is_that_of_pyproject(gemb: Callable[..., Finished]) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    done = gemb("--version")
    assert (done.code, done.out, done.err) == (0, f"gemb {version[1]}\n", "")


def test_gemb_alone_shows_the_help_and_is_a_usage_error(gemb: Callable[..., Finished]) -> None:
    done = gemb()
    assert (done.code, done.out) == (2, "")
    assert done.err == gemb("--help").out


def test_a_wrong_command_is_told_with_the_one_that_was_meant(gemb: Callable[..., Finished]) -> None:
    assert gemb("emed").err == "gemb: no such command: emed; did you mean embed?\n"
    done = gemb("xyz")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"gemb: no such command: xyz; the commands are {', '.join(commands.COMMANDS)}\n"


def test_a_wrong_option_is_told_with_the_one_that_was_meant(gemb: Callable[..., Finished]) -> None:
    done = gemb("recipes", "list", "--jsn")
    assert done.err == "gemb: recipes list: no such option: --jsn; did you mean --json?\n"


def test_shell_completion_knows_commands_and_options() -> None:
    def complete(words: str) -> str:
        environment = {**os.environ, "_GEMB_COMPLETE": "complete_bash", "COMP_WORDS": words,
                       "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        command = [
            sys.executable,
            "-c",
            "from importlib import import_module as i; i('gemb.commands').main()",
        ]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout

    assert complete("gemb re").split() == ["recipes"]
    assert complete("gemb recipes c").split() == ["copy"]
    assert "--json" in complete("gemb recipes list --j")
    assert complete("gemb embed --precision b").split() == ["bf16"]


def test_the_cli_page_is_what_the_program_says() -> None:
    command = [sys.executable, "docs/generate_cli.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_gemb_is_the_same_door(gemb_process: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = gemb_process("recipes", "lst")
    assert process.communicate() == (
        b"", b"gemb: recipes: no such command 'lst'; did you mean 'list'?\n"
    )  # fmt: skip
    assert process.returncode == 2


def test_the_data_folder_is_only_a_neighbour() -> None:
    assert (Path(ROOT) / "shared").exists() is False
