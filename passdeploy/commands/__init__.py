"""The commands as functions of a recipe, a run folder or a model; parsing and printing is in cli.py."""
