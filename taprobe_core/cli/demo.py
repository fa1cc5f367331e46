"""`taprobe demo-build`: make the demo's reasoners and rollouts again, or check those that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from taprobe_core.cli.app import EXIT_UNSOUND, app, err, out, show_progress
from taprobe_core.errors import ConfigError, CorruptArtifactError


@app.command(name="demo-build")
def demo_build(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where to build, or what to check (default: what is bundled)."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Hash, recompute and sample again instead of building."),
    ] = False,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train and sample.")
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is built.")] = 0,
) -> None:
    """Train the demo's reasoners and sample their rollouts: minutes on a GPU, a day on 2 cores."""
    import torch

    from taprobe_core.demo.audit import check_bundle, finish_build
    from taprobe_core.demo.build import Recipe, build_demo
    from taprobe_core.demo.bundle import BUNDLE

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if check:
        try:
            for line in check_bundle(folder or BUNDLE, torch.device(name)):
                out.print(line)
        except CorruptArtifactError as error:
            err.print(f"[red]unsound[/] {escape(str(error))}")
            raise typer.Exit(EXIT_UNSOUND) from None
        return
    if folder is None:
        raise ConfigError(
            "nowhere to build", "taprobe demo-build FOLDER", "name a new folder, or pass --check"
        )
    show_progress()
    build_demo(folder, Recipe(seed=seed), torch.device(name))
    manifest = finish_build(folder)
    for reasoner, gates in manifest["gates"].items():
        out.print(f"{reasoner}: format valid {gates['format_valid']:.4f}, see {folder}")
