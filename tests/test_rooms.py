"""What importing a room costs: torch and transformers are loaded inside functions, by those who need them."""

import pytest

from tests.conftest import modules_after

HEAVY = {"torch", "transformers", "usearch", "sklearn", "scipy", "matplotlib", "optuna"}


@pytest.mark.parametrize(
    "room",
    "commands device engine errors evaluation files jobs recipe report retrieval store text vectors".split(),
)
def test_a_room_loads_nothing_heavy(room: str) -> None:
    statement = f"""
import importlib, pkgutil
room = importlib.import_module('gemb.{room}')
for module in pkgutil.walk_packages(getattr(room, "__path__", ()), "gemb.{room}."):
    importlib.import_module(module.name)
"""
    loaded = modules_after(statement)
    assert "gemb" in loaded
    assert HEAVY.isdisjoint(loaded)
