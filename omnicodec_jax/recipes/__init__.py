"""Recipes: configs of whole experiments, by the names that --config takes."""
