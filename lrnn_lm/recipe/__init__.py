"""Recipes: the schema and the YAML loader. Imports no torch."""

from .explain import explain
from .launch import LaunchSection
from .load import (
    RecipeError,
    dump_recipe,
    flatten,
    is_text,
    load_recipe,
    read_yaml,
    recipe_from_dict,
    resolve_path,
    shipped,
)
from .mixer import MixerSection
from .quantities import Every, Span, format_count, parse_count, parse_time_limit
from .schema import ModelSection, Recipe

__all__ = [
    "Every", "LaunchSection", "MixerSection", "ModelSection", "Recipe", "RecipeError", "Span", "dump_recipe",
    "explain", "flatten", "format_count", "is_text", "load_recipe", "parse_count", "parse_time_limit",
    "read_yaml", "recipe_from_dict", "resolve_path", "shipped",
]  # fmt: skip
