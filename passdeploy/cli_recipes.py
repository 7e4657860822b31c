"""The commands before a run, which train nothing: `passdeploy recipes`, `init`, `check` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click

from passdeploy.cli_completion import complete_recipe
from passdeploy.cli_options import common_options, recipe_name, recipe_options, terminal_listener, with_force
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
    from passdeploy.recipe import load_recipe

    name = recipe_name(recipe_option, recipe_argument)
    recipe = load_recipe(name, with_force(overrides))

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
    changes = "".join(f" --set {quote(override)}" for override in overrides)
    step = f"passdeploy prune --recipe {quote(name)}{changes}"
    Output(as_json, quiet).show(document, groups_table(document), *lines, next_step=step)


@click.command(short_help="Show the channel groups and blocks of a network.")
@click.argument("model")
@click.option("--weights", help="pretrained, or a .safetensors, .pt or .pth file.")
@click.option("--classes", type=click.IntRange(min=1), default=1000, show_default=True, help="Outputs of the network.")
@click.option(
    "--image-size", type=click.IntRange(min=8), default=224, show_default=True, help="Height and width in pixels."
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
    image_size: int,
    round_to: int,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show the channel groups and blocks of MODEL: torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory."""
    from passdeploy.commands.describe import describe, inspect_model
    from passdeploy.display.check_report import blocks_table, groups_table

    with terminal_listener(quiet):
        channels = inspect_model(
            model, num_classes=classes, image_size=image_size, weights=weights, allow_code=allow_code
        )
        document = {"model": model, "image_size": image_size, **describe(channels, round_to=round_to)}
    Output(as_json, quiet).show(
        document,
        groups_table(document),
        *([blocks] if (blocks := blocks_table(document)) else []),
        *document["words"],
        next_step=f"passdeploy init --model {model} --data DIR, for a recipe to prune it with",
    )


@click.command()
@click.option("--model", required=True, help="torchvision/NAME, timm/NAME, passdeploy/NAME or pkg.mod:factory.")
@click.option("--data", required=True, help="A folder with a folder of images per class, or the name of a data set.")
@click.option("--root", help="The folder of the data set that --data names.")
@click.option("--weights", help="pretrained, none, or a .safetensors file. Left out: pretrained where there are some.")
@click.option("--image-size", type=click.IntRange(min=8), help="Height and width in pixels; left out: the network's.")
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
        weights=weights,
        image_size=image_size,
        allow_code=allow_code,
        overwrite=force,
    )
    Output(as_json, quiet).show(
        {"recipe": str(new.path), "schema": str(new.schema), "classes": list(new.contents.train)},
        *new.contents.lines,
        paths=[new.path, new.schema],
        next_step=f"passdeploy check --recipe {new.path}",
    )


@click.group(invoke_without_command=True, short_help="List and show the recipes that come with passdeploy.")
@click.pass_context
def recipes(context: click.Context) -> None:
    """List and show the recipes that come with passdeploy, and describe the keys of a recipe."""
    if context.invoked_subcommand is None:
        context.invoke(list_recipes)


@recipes.command("list")
@common_options
def list_recipes(as_json: bool = False, quiet: bool = False) -> None:
    """List the recipes: model, data set, image size, target, and the images that training goes through."""
    from passdeploy.commands.list_recipes import describe_recipes, recipes_table

    found = describe_recipes()
    Output(as_json, quiet).show(
        {"recipes": [recipe["file"] for recipe in found], "details": found},
        recipes_table(found),
        next_step="passdeploy recipes show mobilenetv2.yaml",
        or_step="passdeploy init --model NAME --data DIR, for a recipe of your own",
    )


@recipes.command("show")
@click.argument("name", shell_complete=complete_recipe)
@common_options
def show_recipe(name: str, as_json: bool, quiet: bool) -> None:
    """Print a recipe, to copy and change."""
    from passdeploy.recipe import SCHEMA_FILE, find_recipe

    found = find_recipe(name)
    text = found.read_text(encoding="utf-8")
    if isinstance(found, Path):  # a copy lies elsewhere, and still finds the schema
        schema = found.with_name(SCHEMA_FILE)
        text = text.replace(f"$schema={SCHEMA_FILE}", f"$schema={schema}") if schema.is_file() else text
    if as_json:
        Output(as_json).show({"name": name, "text": text})
        return
    click.echo(text.rstrip("\n"))  # as it is in the file, whatever the width of the terminal
    if not quiet:
        click.echo(f"next: passdeploy check --recipe {name}", err=True)


@recipes.command("schema")
@common_options
def show_schema(as_json: bool, quiet: bool) -> None:
    """Print the JSON Schema of recipes: every key with its default and meaning."""
    from passdeploy.recipe import recipe_schema

    Output(as_json=True).show(recipe_schema())
