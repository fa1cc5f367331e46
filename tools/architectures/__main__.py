"""Judge model types and drawn configurations, print the verdicts, write the page.

`python -m tools.architectures` takes them all, names on the command line these alone. With
`--verdicts FILE` each verdict is appended there as a JSON line, and what stands there already is
left out, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

from tools.architectures.page import page_of
from tools.architectures.sweep import SEED, Verdict, causal_types, judge_all


def main() -> int:
    """Return 1 where something was raw or silent."""
    warnings.simplefilter("ignore")
    asked = argparse.ArgumentParser(prog="python -m tools.architectures", description=__doc__)
    asked.add_argument("names", nargs="*", help=f"model types, or {SEED} and a seed")
    asked.add_argument("--fuzz", type=int, default=200, help="drawn configurations of a whole run")
    asked.add_argument("--jobs", type=int, default=1, help="processes at a time")
    asked.add_argument("--verdicts", type=Path, help="JSON lines, gone on with where they end")
    asked.add_argument("--page", type=Path, help="where the page goes after a whole run")
    options = asked.parse_args()
    found = {each.name: each for each in _read(options.verdicts)}
    everything = [*causal_types(), *(f"{SEED}{seed}" for seed in range(options.fuzz))]
    wanted = options.names or [name for name in everything if name not in found]
    for verdict in judge_all(wanted, options.jobs):
        found[verdict.name] = verdict
        words = f"{verdict.alone} | {verdict.packed} | {verdict.attention}"
        about = " ".join(each for each in (verdict.reason, verdict.detail, verdict.told) if each)
        print(f"{verdict.name}: {words} | {about}", flush=True)
        if options.verdicts:
            with options.verdicts.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
    wrong = [name for name, verdict in found.items() if not verdict.is_right]
    print(f"{len(found)} judged, {len(wrong)} of them raw or silent: {', '.join(wrong)}")
    if options.page and not options.names:
        options.page.write_text(page_of([found[name] for name in everything]))
    return 1 if wrong else 0


def _read(path: Path | None) -> list[Verdict]:
    if path is None or not path.exists():
        return []
    return [Verdict(**json.loads(line)) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
