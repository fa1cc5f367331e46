"""Train the demo's reasoners and sample everything from them: one folder, from one seed.

    tokenizer, training with its gates    per reasoner, the tokenizer shared
    base traces, rollouts, forced answers 20 problems, right and wrong, 100 rests a sentence
    truth                                 2,000 rests a sentence, some traces
    manifest                              recipe, figures, hashes (`audit`)

Each step writes one file, whole or not at all, and is left out when its file is there: a build that
was stopped goes on where it was. What does not belong here: how a step works. Invariant: apart from
training, every file depends on recipe and weights alone, on any device.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taprobe_core.demo.bundle import ROLLOUTS, TRUTH, Record, write_records
from taprobe_core.demo.policy import read_answer, read_continuation
from taprobe_core.demo.task import N_TASKS, SETTINGS, Problem, Reasoned, Trace, problem, seeded
from taprobe_core.demo.tokenizer import train_tokenizer
from taprobe_core.demo.truth import choose_problems, measures
from taprobe_core.errors import ConfigError, NotEnoughDataError
from tools.demo import sampling
from tools.demo.sampling import Resampler, base_traces
from tools.demo.training import (
    Architecture,
    Training,
    failed_gates,
    measure_gates,
    train_reasoner,
    training_examples,
)

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

RECIPE, GATES, STEPS = "recipe.json", "gates.json", "steps.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a build makes.

    Attributes:
        seed: of everything.
        reasoners: architectures by name; the name is the model folder, and seeds its draws.
        training: schedule of every reasoner.
        n_problems: problems, the same for all reasoners and settings.
        n_candidates: whole solutions sampled in search of a right and a wrong base trace.
        n_rollouts: resampled rests per sentence.
        n_forced: forced answers per sentence.
        n_truth: rests per sentence for the truth.
        n_truth_problems: traces per setting that have it, the shortest ones.
        n_gate: whole solutions for the gates.
    """

    seed: int = 0
    reasoners: dict[str, Architecture] = field(
        default_factory=lambda: {
            "tiny-qwen2": Architecture("qwen2"),
            "tiny-llama": Architecture("llama"),
        }
    )
    training: Training = field(default_factory=Training)
    n_problems: int = 20
    n_candidates: int = 64
    n_rollouts: int = 100
    n_forced: int = 20
    n_truth: int = 2000
    n_truth_problems: int = 1
    n_gate: int = 4000


def recipe_of(stored: dict[str, Any]) -> Recipe:
    """Return the recipe that a manifest holds."""
    reasoners = {name: Architecture(**shape) for name, shape in stored["reasoners"].items()}
    training = Training(**stored["training"])
    return Recipe(**{**stored, "reasoners": reasoners, "training": training})


def build_demo(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Make, or go on making, all files but the manifest.

    Args:
        folder: created if absent; may hold a part of the same build.
        recipe: what to make.
        device: where to train and sample.

    Raises:
        ConfigError: the folder holds another build.
        NotEnoughDataError: a reasoner fails its gates, or gives no base trace of some grade.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_recipe(folder, recipe)
    build = _Build(folder, recipe, device)
    for name in recipe.reasoners:
        build.train(name)
    for name in recipe.reasoners:
        build.check_gates(name)
        build.sample(name)
        build.measure_truth(name)


class _Build:
    """One build in progress; what several steps need is made once."""

    def __init__(self, folder: Path, recipe: Recipe, device: torch.device) -> None:
        self.folder = folder
        self.recipe = recipe
        self.device = device
        self._traces: dict[str, dict[str, list[Trace]]] = {}

    @cached_property
    def problems(self) -> list[Problem]:
        return choose_problems(self.recipe.n_problems, self.recipe.seed)

    @cached_property
    def examples(self) -> Any:
        return training_examples(self.recipe.training.n_traces, self.recipe.seed)

    def train(self, name: str) -> None:
        def write(folder: Path) -> None:
            from tokenizers import Tokenizer

            train_tokenizer(folder, self.recipe.seed)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # Two names are two models, whatever their shapes.
            seed = seeded(self.recipe.seed, name).getrandbits(32)
            train_reasoner(
                folder,
                self.recipe.reasoners[name],
                self.recipe.training,
                tokenizer,
                self.examples,
                seed,
                self.device,
            )

        self._step(name, write)

    def check_gates(self, name: str) -> None:
        def write(path: Path) -> None:
            rng, n = seeded(self.recipe.seed, "gates"), self.recipe.n_gate
            asked = [problem(rng.randrange(N_TASKS)) for _ in range(n)]
            rows = sampling.uniforms(n, sampling.MAX_NEW_TOKENS, self.recipe.seed, name, "gates")
            texts = self._reasoner(name).complete(
                [some.prompt for some in asked], [row[None] for row in rows]
            )
            measured = measure_gates(asked, [text for (text,) in texts])
            _write_json(path, measured)

        self._step(f"{name}/{GATES}", write)
        measured = json.loads((self.folder / name / GATES).read_text(encoding="utf-8"))
        if faults := failed_gates(measured):
            raise NotEnoughDataError(
                f"the reasoner has not learned enough: {'; '.join(faults)}",
                str(self.folder / name),
                "train longer (n_steps), and build in a new folder",
            )

    def sample(self, name: str) -> None:
        def write(path: Path) -> None:
            write_records(path, self._records(name))

        self._step(f"{name}/{ROLLOUTS}", write)

    def measure_truth(self, name: str) -> None:
        def write(path: Path) -> None:
            _write_json(path, list(self._truths(name)))

        self._step(f"{name}/{TRUTH}", write)

    def _records(self, name: str) -> Iterator[Record]:
        for setting in SETTINGS:
            pairs = list(zip(self.problems, self._base(name)[setting], strict=True))
            rests = iter(self._rests(name, setting, pairs, self.recipe.n_rollouts, "rollouts"))
            answers = iter(self._rests(name, setting, pairs, self.recipe.n_forced, "forced"))
            for some, trace in pairs:
                reasoned = Reasoned(some, trace, [], [])
                for _ in trace.sentences:
                    reasoned.rollouts.append([read_continuation(some, t) for t in next(rests)])
                    reasoned.forced.append([read_answer(some, text) for text in next(answers)])
                yield Record(setting, reasoned, measures(reasoned))

    def _truths(self, name: str) -> Iterator[dict[str, Any]]:
        for setting in SETTINGS:
            pairs = list(zip(self.problems, self._base(name)[setting], strict=True))
            pairs.sort(key=lambda pair: (len(pair[1].sentences), pair[0].id))
            pairs = pairs[: self.recipe.n_truth_problems]
            rests = iter(self._rests(name, setting, pairs, self.recipe.n_truth, "truth"))
            for some, trace in pairs:
                banks = [
                    [read_continuation(some, text) for text in next(rests)] for _ in trace.sentences
                ]
                yield {
                    "setting": setting,
                    "problem_id": some.id,
                    "n_rollouts": self.recipe.n_truth,
                    "measures": measures(Reasoned(some, trace, banks, [])),
                }

    def _rests(
        self, name: str, setting: str, pairs: list[tuple[Problem, Trace]], n: int, purpose: str
    ) -> list[list[str]]:
        at = [(some, trace, i) for some, trace in pairs for i in range(len(trace.sentences))]
        resampler = Resampler(self._reasoner(name), self.recipe.seed, name, setting)
        return resampler.rests(at, n, purpose)

    def _base(self, name: str) -> dict[str, list[Trace]]:
        if name not in self._traces:
            self._traces[name] = base_traces(
                self._reasoner(name),
                self.recipe.seed,
                name,
                self.problems,
                self.recipe.n_candidates,
            )
        return self._traces[name]

    def _reasoner(self, name: str) -> sampling.Reasoner:
        return sampling.Reasoner(self.folder / name, self.device)

    def _step(self, name: str, write: Callable[[Path], None]) -> None:
        target = self.folder / name
        if target.exists():
            return
        _log.info("%s ...", name)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.folder) as temporary:
            made = Path(temporary) / target.name
            write(made)
            shutil.move(made, target)
        record = {
            "step": name,
            "seconds": round(time.monotonic() - began, 1),
            "device": _device_name(self.device),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        }
        with (self.folder / STEPS).open("a", encoding="utf-8") as steps:
            steps.write(json.dumps(record) + "\n")
        _log.info("%s: %.0f s", name, record["seconds"])


def _same_recipe(folder: Path, recipe: Recipe) -> None:
    path, wanted = folder / RECIPE, json.dumps(asdict(recipe), indent=2)
    if not path.exists():
        if next(folder.iterdir(), None) is not None:
            raise ConfigError("the folder is not empty", str(folder), "name a new folder")
        path.write_text(wanted, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != wanted:
        raise ConfigError("the folder holds another build", str(path), "name a new folder")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
