"""Make the demo's reasoners and rollouts again, or check those that exist.

python -m tools.demo --check       hash, recompute and sample again what is bundled
python -m tools.demo NEW_FOLDER    train and sample everything: minutes on a GPU, a day on 2 cores
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from taprobe_core.demo import BUNDLE
from taprobe_core.errors import ConfigError, CorruptArtifactError, TaprobeError
from tools.demo.audit import check_bundle, finish_build
from tools.demo.build import Recipe, build_demo


def main(arguments: list[str] | None = None) -> int:
    """Build or check a bundle; returns 0, 2 for something to mend, 3 for an unsound bundle."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="where to build, or what to check")
    parser.add_argument("--check", action="store_true", help="check instead of building")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is built")
    options = parser.parse_args(arguments)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    try:
        if options.check:
            for line in check_bundle(options.folder or BUNDLE, device):
                print(line)
        elif options.folder is None:
            raise ConfigError("nowhere to build", "arguments", "name a new folder, or pass --check")
        else:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
            build_demo(options.folder, Recipe(seed=options.seed), device)
            for reasoner, gates in finish_build(options.folder)["gates"].items():
                print(f"{reasoner}: format valid {gates['format_valid']:.4f}")
    except TaprobeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, CorruptArtifactError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
