"""Merged models are those of mergekit, which runs in an environment of its own, where it can be installed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemb.jobs.merge import run
from gemb.jobs.merge_recipe import MergeRecipe
from gemb.merging.thinning import drop_at_random, drop_by_rank
from tests.models import tiny_folder

pytestmark = pytest.mark.slow

PACKAGES = ("mergekit==0.1.5", "peft==0.21.2", "immutables==0.21")
"""What mergekit needs beyond the packages of this project."""
MERGE = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for job in json.load(open(sys.argv[1])):
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(job["config"]), job["output"], options=options)
"""
THIN = """
import sys, torch
from mergekit.sparsify import RescaleNorm, bernoulli, della_magprune
from safetensors.torch import load_file, save_file
delta = load_file(sys.argv[1])["delta"]
torch.manual_seed(5)
dare = bernoulli(delta, density=0.3, rescale_norm=RescaleNorm.l1)
torch.manual_seed(5)
della = della_magprune(delta, density=0.5, epsilon=0.2, rescale_norm=RescaleNorm.l1)
save_file({"dare": dare, "della": della}, sys.argv[2])
"""
PLAIN = {"weight": 0.4}
THINNED = {"weight": 0.5, "density": 0.3}
CASES: Mapping[str, dict[str, Any]] = {
    "linear": {"each": {"weight": [1, 3]}, "names": "ab", "other": {"weight": [{"filter": "mlp", "value": 2},
                                                                              {"value": 1}]}},
    "slerp": {
        "names": "ab", "base": "a",
        "all": {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3]}, {"value": 0.25}]},
    },
    "multislerp": {"each": PLAIN},
    "karcher": {},
    "task_arithmetic": {"each": PLAIN, "all": {"lambda": 0.7}, "base": "base"},
    "ties": {"each": THINNED, "base": "base"},
    "breadcrumbs": {"each": {**THINNED, "gamma": 0.02}, "base": "base"},
    "breadcrumbs_ties": {"each": THINNED, "base": "base"},
    "model_stock": {"base": "base"},
    "dare_linear": {"each": PLAIN, "base": "base"},
    "dare_ties": {"each": PLAIN, "base": "base"},
    "della": {"each": PLAIN, "base": "base"},
    "della_linear": {"each": PLAIN, "base": "base"},
}  # fmt: skip
"""Those that drop at random at density 1; what they drop is compared by itself."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models near each other."""
    place = tmp_path_factory.mktemp("models")
    tiny_folder(place / "base", "gemma3")
    for seed, name in enumerate("abc"):
        shutil.copytree(place / "base", place / name)
        generator = torch.Generator().manual_seed(seed)
        file = place / name / "model.safetensors"
        changed = {
            key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in load_file(file).items()
        }
        save_file(changed, file, metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def mergekit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has mergekit."""
    target = tmp_path_factory.mktemp("mergekit")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *PACKAGES]
    if subprocess.run(install, capture_output=True, timeout=180, check=False).returncode:
        pytest.skip("mergekit cannot be installed here")
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def config_of(method: str, place: Path) -> dict[str, Any]:
    case = CASES[method]
    names = case.get("names", "abc")
    models = [{"model": str(place / name), "parameters": case.get("each", {})} for name in names]
    models[-1] = {**models[-1], "parameters": case.get("other", case.get("each", {}))}
    base = {"base_model": str(place / case["base"])} if "base" in case else {}
    shared = {"parameters": case.get("all", {}), "dtype": "float32"}
    return {"merge_method": method, "models": models, **shared, **base}


def finished(program: str, environment: dict[str, str], *arguments: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_shared_method_gives_what_mergekit_gives(
    place: Path, mergekit: dict[str, str], tmp_path: Path
) -> None:
    configs = {method: config_of(method, place) for method in CASES}
    jobs = [{"config": config, "output": str(tmp_path / method)} for method, config in configs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    finished(MERGE, mergekit, tmp_path / "jobs.json")
    for method, config in configs.items():
        output = tmp_path / f"ours-{method}"
        settings = {**config, "variant": "mergekit", "output": str(output)}
        run(MergeRecipe.model_validate_json(json.dumps(settings)))
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / method))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-6, rtol=0, msg=f"{method} {name}")


def test_what_is_dropped_at_random_is_what_mergekit_drops(mergekit: dict[str, str], tmp_path: Path) -> None:
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    save_file({"delta": delta}, tmp_path / "delta.safetensors")
    finished(THIN, mergekit, tmp_path / "delta.safetensors", tmp_path / "thin.safetensors")
    theirs = load_file(tmp_path / "thin.safetensors")
    dare = drop_at_random(delta, 0.3, torch.Generator().manual_seed(5), rescale="norm")
    della = drop_by_rank(delta, 0.5, 0.2, torch.Generator().manual_seed(5), rescale="norm")
    torch.testing.assert_close(dare, theirs["dare"], atol=1e-6, rtol=0)
    torch.testing.assert_close(della, theirs["della"], atol=1e-6, rtol=0)
