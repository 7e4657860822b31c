"""The commands before a run, which train nothing: `passdeploy recipes`, `init`, `check` and `inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from passdeploy.cli_completion import complete_recipe
from passdeploy.cli_options import (
    common_options,
    is_forced,
    list_or_pass_on,
    load_typed_recipe,
    recipe_name,
    recipe_options,
    terminal_listener,
)
from passdeploy.cli_typed import typed_command
from passdeploy.display.output import Output


@click.command(short_help="Load everything of a recipe and train nothing.")
@recipe_options
@common_options
def check(
    recipe_argument: str | None,
    recipe_option: str | None,
    overrides: tuple[str, ...],
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Load the model and data of a recipe, find its channel groups and forecast the run time, without training."""
    name = recipe_name(recipe_option, recipe_argument)
    recipe = load_typed_recipe(name, overrides)

    from passdeploy.commands.describe import describe, describe_run
    from passdeploy.commands.forecast import forecast
    from passdeploy.commands.prepare import prepare
    from passdeploy.display.check_report import groups_table, latency_lines, run_time_line
    from passdeploy.runtime.devices import find_device

    with terminal_listener(quiet) as listener:
        prepared = prepare(recipe, allow_code=allow_code, listener=listener)
        document = {
            "recipe": recipe.name,
            **describe_run(prepared),
            **describe(prepared.channels, round_to=prepared.round_to),
            "seconds": forecast(prepared, find_device()),
        }
    contents = prepared.data.contents
    lines = [
        *(contents.lines if contents is not None else ()),
        f"input: {prepared.data.image_shape[-1]} pixels, {prepared.data.preprocessing.text}",
        *document["words"],
        *latency_lines(document["latency"]),
        run_time_line(document["seconds"]),
    ]
    changes = [word for override in overrides for word in ("--set", override)]
    step = typed_command("prune", "--recipe", name, *changes, force=is_forced(), allow_code=allow_code)
    Output(as_json, quiet).show(document, groups_table(document), *lines, next_step=step)


@click.command(short_help="Show the channel groups and blocks of a network.")
@click.argument("model")
@click.option("--weights", help="pretrained, or a .safetensors, .pt or .pth file.")
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True, help="Outputs of the network.")
@click.option(
    "--image-size",
    type=click.IntRange(min=8),
    help="Height and width in pixels; left out: what the network was made for, or 224.",
)
@click.option(
    "--round-to", type=click.IntRange(min=1), default=8, show_default=True, help="Round widths to multiples of this."
)
@click.option("--allow-code", is_flag=True, help="Import the module of pkg.mod:factory.")
@common_options
def inspect(
    model: str,
    weights: str | None,
    classes: int,
    image_size: int | None,
    round_to: int,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show the channel groups and blocks of MODEL: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory."""
    from passdeploy.commands.describe import describe, inspect_model
    from passdeploy.commands.init import usual_image_size
    from passdeploy.display.check_report import blocks_table, groups_table
    from passdeploy.models.published_input import published_input

    with terminal_listener(quiet):
        image_size = image_size or usual_image_size(model, published_input(model))
        channels = inspect_model(
            model, num_classes=classes, image_size=image_size, weights=weights, allow_code=allow_code
        )
        document = {"model": model, "image_size": image_size, **describe(channels, round_to=round_to)}
    own_weights = ("--weights", weights) if weights else ()
    step = typed_command("init", "--model", model, "--data", "DIR", *own_weights, allow_code=allow_code)
    Output(as_json, quiet).show(
        document,
        groups_table(document),
        *([blocks] if (blocks := blocks_table(document)) else []),
        f"input: {image_size} pixels",
        *document["words"],
        next_step=f"{step}   # for a recipe to prune it with",
    )


@click.command()
@click.option("--model", required=True, help="torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory.")
@click.option(
    "--data",
    required=True,
    help="A folder of images, with train/CLASS/ and test/CLASS/ or just CLASS/; or the name of a data set, or hf/NAME.",
)
@click.option("--root", help="The folder of the data set that --data names.")
@click.option("--train-folder", metavar="NAME", help="The folder in --data to train on, if it is not called train.")
@click.option("--test-folder", metavar="NAME", help="The one to test on, if it is not called test or val.")
@click.option(
    "--weights",
    help="pretrained, none, or a .safetensors, .pt or .pth file. Left out: pretrained where there are some.",
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 4096),
    help="Height and width in pixels; left out: the data set's or the network's.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.yaml"),
    show_default=True,
    help="The recipe to write.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--allow-code", is_flag=True, help="Import the module of pkg.mod:factory.")
@common_options
def init(
    model: str,
    data: str,
    root: str | None,
    train_folder: str | None,
    test_folder: str | None,
    weights: str | None,
    image_size: int | None,
    out: Path,
    force: bool,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a commented recipe for a network and your images."""
    from passdeploy.commands.init import write_recipe

    new = write_recipe(
        model,
        data,
        out,
        root=root,
        train_folder=train_folder,
        test_folder=test_folder,
        weights=weights,
        image_size=image_size,
        allow_code=allow_code,
        overwrite=force,
    )
    Output(as_json, quiet).show(
        {"recipe": str(new.path), "schema": str(new.schema), "classes": list(new.contents.train)},
        *new.contents.lines,
        paths=[new.path, new.schema],
        next_step=typed_command("check", "--recipe", str(new.path), allow_code=allow_code),
    )


@click.group(invoke_without_command=True, short_help="List and show the recipes that come with passdeploy.")
@common_options
@click.pass_context
def recipes(context: click.Context, /, **_: object) -> None:
    """List and show the recipes that come with passdeploy, and describe the keys of a recipe."""
    list_or_pass_on(context, list_recipes)


@recipes.command("list")
@common_options
def list_recipes(as_json: bool, quiet: bool) -> None:
    """List the recipes: model, data set, image size, target, and the images that training goes through."""
    from passdeploy.commands.list_recipes import describe_recipes, recipes_table

    found = describe_recipes()
    Output(as_json, quiet).show(
        {"recipes": [recipe["file"] for recipe in found], "details": found},
        recipes_table(found),
        next_step="passdeploy recipes show mobilenetv2.yaml",
        or_step="passdeploy init --model NAME --data DIR   # for a recipe of your own",
    )


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipe)
@common_options
def show_recipe(name: str, as_json: bool, quiet: bool) -> None:
    """Print a recipe, to copy and change."""
    from passdeploy.recipe import SCHEMA_FILE, find_recipe
    from passdeploy.recipe.loading import read_recipe_text

    found = find_recipe(name)
    text = read_recipe_text(found, name)
    if isinstance(found, Path):  # a copy lies elsewhere, and still finds the schema
        schema = found.with_name(SCHEMA_FILE)
        text = text.replace(f"$schema={SCHEMA_FILE}", f"$schema={schema}") if schema.is_file() else text
    if as_json:
        Output(as_json).show({"name": name, "text": text})
        return
    click.echo(text.rstrip("\n"))  # as it is in the file, whatever the width of the terminal
    if not quiet:
        click.echo("next: " + typed_command("check", "--recipe", name), err=True)


@recipes.command("schema")
@common_options
def show_schema(as_json: bool, quiet: bool) -> None:
    """Print the JSON Schema of recipes: every key with its default and meaning."""
    from passdeploy.recipe import recipe_schema

    Output(as_json=True).show(recipe_schema())
