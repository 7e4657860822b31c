from __future__ import annotations

from io import StringIO

from rich.console import Console

from passdeploy.display.tables import group_table, layer_table

WHY = "its kernel computes 16 channels at a time"


def text_of(table: object, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def layer(name: str, why: str) -> dict[str, object]:
    times = {"dense_ms": 0.0123, "slim_ms": 0.0102}
    return {"name": name, "dense_channels": (144, 24), "slim_channels": (96, 24), **times, "why": why}


def test_a_reason_is_readable_in_a_narrow_terminal_and_shared_by_rows():
    shown = text_of(layer_table([layer("features.3.conv.0.0", WHY), layer("conv1", ""), layer("features.4", WHY)]))
    assert shown.count(f"1: no faster because {WHY}") == 1
    assert "2:" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    names = {"group": "conv1", "layers": ["conv1"], "dense_width": 256, "slim_width": 128, "share": 0.12}
    shown = text_of(group_table([{**names, "dense_ms": 1.2, "slim_ms": 0.8, "why": WHY}]))
    assert f"1: no faster because {WHY}" in shown
    assert "share: of the time of the slim network" in shown


def test_without_reasons_there_is_nothing_under_the_layers():
    assert text_of(layer_table([layer("conv1", "")])).rstrip().endswith("┘")
