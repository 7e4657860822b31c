"""Import order of the package: a folder imports only folders below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import passdeploy

PACKAGE = Path(passdeploy.__file__).parent

# From the bottom up; folders in one line do not import each other. CONTRIBUTING.md has the same table.
LAYERS = (
    ("errors",),
    ("channels", "recipe", "runtime"),
    ("models", "data"),
    ("tracing", "slimming", "training", "export", "images"),
    ("grouping", "profiling", "runs"),
    ("latency", "sparsity", "display"),
    ("report", "trainers"),
    ("commands",),
    ("cli_completion", "cli_group", "cli_numbers", "cli_typed"),
    ("cli_execution", "cli_export", "cli_options", "cli_profile"),
    ("cli_prune", "cli_recipes", "cli_runs"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(file: Path) -> str:
    return ".".join(["passdeploy", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(file: Path) -> set[str]:
    """Collect the modules of passdeploy that a file imports, also inside functions and for type checkers only."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    return imported & set(MODULES)


def layer_of(module: str) -> str:
    return module.split(".")[1]


def test_every_module_belongs_to_a_layer():
    assert {layer_of(module) for module in MODULES if "." in module} == set(RANK)


def test_imports_run_downwards():
    upwards = [
        f"{module} imports {imported}"
        for module, file in MODULES.items()
        if "." in module
        for imported in sorted(imports_of(file))
        if "." in imported and layer_of(imported) != layer_of(module)
        if RANK[layer_of(imported)] >= RANK[layer_of(module)]
    ]
    assert not upwards, "\n".join(upwards)


def test_the_public_names_are_imported_by_nobody_inside():
    inside = [module for module, file in MODULES.items() if module != "passdeploy" and "passdeploy" in imports_of(file)]
    assert not inside


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports_of(file) - {module} for module, file in MODULES.items() if module != "passdeploy"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
