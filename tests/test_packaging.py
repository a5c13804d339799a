"""What is shipped: the packages listed, the wheel and the sdist, gemb installed in a fresh environment."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = ROOT / "constraints.txt"
LIGHT = ["typer", "rich", "pydantic", "PyYAML", "orjson"]
"""What `gemb --version`, `gemb --help` and `gemb recipes` need; torch takes a minute to install."""


def run(*command: str | Path, cwd: Path, constrained: bool = True) -> str:
    """Run `command` with the pins in force and no trace of the checkout; its stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if constrained:
        environment["PIP_CONSTRAINT"] = str(CONSTRAINTS)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_checkout(folder: Path) -> Path:
    """A copy of what git keeps, or would keep: no stale build/ folder, and no trace left in the checkout."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it as a release is."""
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    run(sys.executable, "-m", "build", cwd=checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    (wheel,) = (checkout / "dist").glob("*.whl")
    return sdist, wheel


def fresh_environment(folder: Path) -> Path:
    """The Python of a new environment in `folder` that sees no other packages; it has no pip of its own."""
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


def install(python: Path, *words: str | Path, cwd: Path) -> None:
    """Install into the environment of `python`, pinned."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "-c", CONSTRAINTS)
    run(*pip, *words, cwd=cwd)


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    inner = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "gemb").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == inner | {"gemb.commands", "gemb.recipes"}
    assert mapped == {"gemb": "gemb", "gemb.commands": "commands", "gemb.recipes": "recipes"}
    assert not (ROOT / "gemb" / "commands").exists()  # it would hide commands/


def test_the_newest_version_of_the_changelog_is_that_of_pyproject() -> None:
    headings = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0][0] == PROJECT["project"]["version"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|unreleased", date) for _, date in headings)


def test_every_dependency_is_pinned_and_every_pin_is_exact() -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    names = [canonical(pin.partition("==")[0]) for pin in pins]
    assert names == sorted(set(names), key=names.index)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    wanted += [each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra]
    for requirement in wanted:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None
        assert canonical(match.group()) in [*names, "gemb"], requirement
    assert "torch==2.13.0" in pins


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_wheel_holds_only_gemb_with_its_commands_and_recipes(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        metadata = Parser().parsestr(
            wheel.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        )
    assert {name.partition("/")[0] for name in names} == {"gemb", f"gemb-{metadata['Version']}.dist-info"}
    checkout = built[1].parent.parent
    on_disk = {
        path.relative_to(checkout).as_posix()
        for pattern in ("gemb/**/*.py", "commands/**/*.py", "recipes/**/*.yaml", "gemb/py.typed")
        for path in checkout.glob(pattern)
    }
    shipped = {name for name in names if name.startswith("gemb/")}
    assert shipped == {name if name.startswith("gemb/") else f"gemb/{name}" for name in on_disk}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_sdist_holds_what_is_needed_to_test_it(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("CHANGELOG.md", "LICENSE", "README.md", "constraints.txt", "tests/test_packaging.py"):
        assert name in names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_wheel_runs_in_a_fresh_environment_from_an_empty_folder(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    install(python, *LIGHT, cwd=empty)
    install(python, "--no-deps", built[1], cwd=empty)
    check_installed(python, empty)


@pytest.mark.slow
def test_the_wheel_with_all_it_needs_runs_in_a_fresh_environment(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    install(python, built[1], cwd=empty)
    check_installed(python, empty)
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=empty)
    run(python, "-c", "from gemb import Encoder; Encoder.load", cwd=empty)


def check_installed(python: Path, empty: Path) -> None:
    """The console script and `python -m gemb` run, and site-packages has no other name of ours."""
    version = PROJECT["project"]["version"]
    gemb = python.with_name("gemb")
    assert run(gemb, "--version", cwd=empty) == f"gemb {version}\n"
    assert run(python, "-m", "gemb", "--version", cwd=empty) == f"gemb {version}\n"
    assert "  embed " in run(gemb, "--help", cwd=empty)
    recipes = len(list((ROOT / "recipes").rglob("*.yaml")))
    assert run(gemb, "recipes", "list", cwd=empty).startswith(f"{recipes} recipe")
    listing = "from importlib.metadata import files; print(*{f.parts[0] for f in files('gemb')}, sep='\\n')"
    ours = set(run(python, "-c", listing, cwd=empty).split())
    assert ours == {"..", "gemb", f"gemb-{version}.dist-info"}  # `..` is bin/gemb
    assert list(empty.iterdir()) == []


def test_the_bounds_fit_the_packages_that_the_tests_run_with(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", "."]
    planned = run(*command, cwd=checkout, constrained=False).splitlines()[-1]
    assert planned == f"Would install gemb-{PROJECT['project']['version']}"


@pytest.mark.slow
def test_pip_can_resolve_the_bare_install(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "."]
    planned = run(*command, cwd=checkout, constrained=False).splitlines()[-1]
    assert f"gemb-{PROJECT['project']['version']}" in planned
    assert " torch-" in planned


def test_a_checkout_that_is_not_installed_runs(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path)
    program = "import sys; sys.path.insert(0, '.'); import gemb; print(gemb.__version__)"
    assert run(sys.executable, "-S", "-c", program, cwd=checkout) == "0+unknown\n"
    assert run(sys.executable, "-m", "gemb", "--help", cwd=checkout).startswith("Usage: gemb ")
    recipes = len(list((ROOT / "recipes").rglob("*.yaml")))
    listing = run(sys.executable, "-m", "gemb", "recipes", "list", cwd=checkout)
    assert listing.startswith(f"{recipes} recipe")
