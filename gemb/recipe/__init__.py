"""The recipe schema: one YAML file to one typed, frozen recipe, with every problem told at once.

A command's recipe is a class derived from `Recipe`; the sentence under a field is its only explanation
and becomes `--help`, the docs page and the JSON schema.
"""

from gemb.recipe.loading import Origin, load, load_one_of, origin, refused
from gemb.recipe.schema import (
    ComputeRecipe,
    InferenceRecipe,
    ModelName,
    Recipe,
    RecipeInput,
    RecipePath,
    json_schema,
    key_of,
    refused_precision,
    resolved,
)
from gemb.recipe.shipped import ShippedRecipe, shipped_recipes

__all__ = [
    "ComputeRecipe",
    "InferenceRecipe",
    "ModelName",
    "Origin",
    "Recipe",
    "RecipeInput",
    "RecipePath",
    "ShippedRecipe",
    "json_schema",
    "key_of",
    "load",
    "load_one_of",
    "origin",
    "refused",
    "refused_precision",
    "resolved",
    "shipped_recipes",
]
