"""Activations and vertical attention of any set of cells: one pass and one artifact a text.

Cells are grouped by model, so the weights are loaded once; each text runs once, whatever the number
of layers that still lack it; and all that a pass makes of it is committed as soon as it exists, an
artifact for its activations and one for its attention. On a CPU a kill therefore costs one text; on
an accelerator, which runs several texts at once and the next ones meanwhile, the packs in flight. A
longer list of layers or poolings extracts only what is missing, into a further artifact of the same
text, so what a cell reads is found by the names of tensors in the manifests. A text that fails
costs what it could not make, and the indexes of the cells that want it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import polars as pl
import torch
import transformers

from taprobe_core.activations.cost import attention_bytes, bytes_of, cost_line, pass_flop
from taprobe_core.activations.extraction import Extracted, extract
from taprobe_core.activations.gemm_rate import BlockShape
from taprobe_core.activations.schedule import N_WRITERS, each_ahead
from taprobe_core.activations.tasks import (
    ACTIVATIONS_FILE,
    ATTENTION_FILE,
    ActivationShard,
    AttentionShard,
    ExtractOptions,
    TextTask,
    tasks_of,
    tensor_name,
    text_tensors,
    write_text,
)
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.checkpoints import (
    LoadedModel,
    load_base_model,
    pick_devices,
    resolve_checkpoint,
)
from taprobe_core.errors import MissingArtifactError, TaprobeError, attempted
from taprobe_core.keys import Site
from taprobe_core.pipeline.commit import checkpoint_provenance
from taprobe_core.pipeline.plan import Plan, text_partition
from taprobe_core.store import ArtifactKey

_log = logging.getLogger(__name__)

Faults = dict[int, dict[str, TaprobeError]]
"""Layer -> problem -> why its shard could not be made; the problem is empty where none could be."""

MAX_VAIN_TEXTS = 10
"""Texts that may fail at the start with no shard made: by then it is the model, not the texts."""

_SECONDS_BETWEEN_LINES = 5


FILES = {"activation_shards": ACTIVATIONS_FILE, "attention_shards": ATTENTION_FILE}
"""Kind of artifact -> its one file."""

Held = dict[int, dict[str, ArtifactKey]]
"""Problem -> name of a tensor of its text -> the artifact that holds it."""


class Ready(NamedTuple):
    """One setting of a model, whose texts have all gone through it.

    Attributes:
        setting: the setting.
        sites: of the model, that are asked for.
        held: by kind of artifact, what there is of each text; None where they could not be read.
        new: by kind, the layers of which something was missing.
        faults: what failed, by layer.
    """

    setting: str
    sites: list[Site]
    held: Mapping[str, Held] | None
    new: Mapping[str, frozenset[int]]
    faults: Faults

    def faults_at(self, layer: int) -> Mapping[str, TaprobeError]:
        """Why something is not there at a layer."""
        gone = MissingArtifactError(
            "artifacts of its texts were removed meanwhile",
            f"layer {layer}, {self.setting}",
            "run the stage again",
        )
        return self.faults.get(layer) or {"": gone}


def wanted_tensors(plan: Plan, kind: str, layer: int) -> list[str]:
    """Names of a text's tensors that a cell needs: its poolings, or what stands for attention."""
    if kind == "activation_shards":
        return [tensor_name(layer, pooling) for pooling in plan.study.activations.poolings]
    return [tensor_name(layer, "mass" if plan.study.attention.mode == "full" else "tail_mass")]


def cell_parts(
    plan: Plan, kind: str, site: Site, ready: Ready
) -> dict[int, list[ArtifactKey]] | None:
    """Return which artifacts hold `wanted_tensors` of each text; None if they are not all there."""
    names = wanted_tensors(plan, kind, site.layer)
    if ready.held is None or not all(each.keys() >= {*names} for each in ready.held[kind].values()):
        return None
    return {
        problem_id: [each[name] for name in names] for problem_id, each in ready.held[kind].items()
    }


def extracted(
    plan: Plan, cells: Sequence[tuple[Site, str]], kinds: Sequence[str]
) -> Iterator[Ready]:
    """Yield each setting of each model once what can be made of its texts is there.

    Args:
        plan: the plan.
        cells: (site, setting) pairs in any order.
        kinds: of artifacts. A site that lacks one of these is run, and then all kinds that it lacks
            are made.
    """
    grouped: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site, setting in cells:
        grouped[site.model][setting].append(site)
    for model, by_setting in grouped.items():
        extraction = _Extraction(plan, model)
        for setting, sites in by_setting.items():
            where = f"activations {model}, {setting}"
            ready = attempted(partial(_ready, plan, extraction, setting, sites, kinds), where)
            if isinstance(ready, TaprobeError):
                faults: Faults = {site.layer: {"": ready} for site in sites}
                ready = Ready(setting, sites, None, {}, faults)
            yield ready


def shard_kinds(plan: Plan) -> tuple[str, ...]:
    """The kinds of artifacts that a study keeps of a text."""
    is_attention = plan.study.attention.mode != "off"
    return ("activation_shards", "attention_shards") if is_attention else ("activation_shards",)


def _ready(
    plan: Plan, extraction: _Extraction, setting: str, sites: list[Site], kinds: Sequence[str]
) -> Ready:
    model = extraction.model
    artifact = plan.open("spans", (model, setting))
    texts, spans = (artifact.read_table(f"{n}.parquet") for n in ("texts", "spans"))
    held = {kind: _held(plan, kind, model, setting, texts) for kind in shard_kinds(plan)}

    def lacking(kind: str, layers: Iterable[int]) -> dict[int, list[int]]:
        """Problem id -> layers of which something is missing."""
        names = {layer: {*wanted_tensors(plan, kind, layer)} for layer in layers}
        return {
            problem_id: [layer for layer in names if not names[layer] <= there.keys()]
            for problem_id, there in held[kind].items()
        }

    asked = {site.layer for site in sites}
    run = {layer for kind in kinds for each in lacking(kind, asked).values() for layer in each}
    missing = {kind: lacking(kind, sorted(run)) for kind in held}
    tasks = tasks_of(texts, spans, *missing.values())
    faults: Faults = {}
    if tasks:
        where = f"activations {model}, {setting}"
        ran = attempted(partial(extraction.run, setting, tasks, held), where)
        if isinstance(ran, TaprobeError):
            # A layer that lacks nothing is there whatever became of the others.
            ran = {layer: {"": ran} for layer in _layers(tasks)}
        faults = ran
        held = {kind: _held(plan, kind, model, setting, texts) for kind in held}
    new = {
        kind: frozenset(layer for each in by_problem.values() for layer in each)
        for kind, by_problem in missing.items()
    }
    return Ready(setting, sites, held, new, faults)


def _held(plan: Plan, kind: str, model: str, setting: str, texts: pl.DataFrame) -> Held:
    """Find what there is of each text, made from what the plan would make it from."""
    held: Held = {}
    for problem_id, input_sha256 in texts.select("problem_id", "input_sha256").iter_rows():
        found: dict[str, ArtifactKey] = {}
        newest: ArtifactKey | None = None
        for artifact in plan.store.versions(kind, text_partition(model, setting, problem_id)):
            is_text = FILES[kind] in artifact.manifest.files
            names = list(artifact.tensors(FILES[kind])) if is_text else []
            if artifact.key == plan.shard(kind, model, setting, problem_id, input_sha256, names):
                newest = artifact.key
                found = dict.fromkeys(names, newest) | found
        if newest is not None:
            # A kill between a version's name and its partition's pointer leaves the first without
            # the second.
            plan.store.adopt(newest)
        held[problem_id] = found
    return held


def _layers(tasks: Sequence[TextTask]) -> set[int]:
    return {layer for task in tasks for layer in (*task.layers, *task.attention_layers)}


class _Extraction:
    """One model, loaded when a first text has to run."""

    def __init__(self, plan: Plan, model: str) -> None:
        self.model = model
        self._plan = plan

    @cached_property
    def _answer(self) -> LoadedModel | TaprobeError:
        # Asked once: a checkpoint that cannot be loaded for one setting cannot be for the next.
        return attempted(self._load, f"model {self.model}")

    @property
    def _loaded(self) -> LoadedModel:
        if isinstance(self._answer, TaprobeError):
            raise self._answer
        return self._answer

    def _load(self) -> LoadedModel:
        plan = self._plan
        spec = plan.model(self.model)
        files = resolve_checkpoint(spec, plan.checkpoints_root, plan.pins)
        loaded = load_base_model(files, spec, pick_devices(plan.study.activations.device))
        plan.check_model(self.model)
        return loaded

    def run(self, setting: str, tasks: list[TextTask], held: Mapping[str, Held]) -> Faults:
        """Commit what texts lack; return why some of it could not be made."""
        plan, model, loaded = self._plan, self.model, self._loaded
        study = plan.study.activations
        mode = AttentionMode(plan.study.attention.mode, plan.study.attention.last_n)
        lacking = {
            pooling
            for task in tasks
            for layer in task.layers
            for pooling in study.poolings
            if tensor_name(layer, pooling) not in held["activation_shards"][task.problem_id]
        }
        poolings = tuple(pooling for pooling in study.poolings if pooling in lacking)
        options = ExtractOptions(poolings, study.storage, mode, study.token_budget)
        _log.info("activations %s %s: %s", model, setting, _cost(tasks, options, loaded))
        provenance = _provenance(plan, model, setting, loaded)
        said = time.monotonic()
        faults: Faults = defaultdict(dict)
        n_made = n_failed = 0
        items = extract(loaded.modules, tasks, options, keeps_faults=True)

        def commit(item: Extracted) -> TaprobeError | None:
            where = f"problem {item.problem_id} of {model}, {setting}"
            return attempted(partial(_commit, plan, model, setting, item, held, provenance), where)

        # An accelerator goes on meanwhile; a CPU has nothing to spare, so its passes wait.
        n_threads = N_WRITERS if loaded.devices[0].type == "cuda" else 0
        for item, unkept in each_ahead(commit, items, n_threads):
            failed = dict(item.faults)
            if unkept is not None:
                failed |= dict.fromkeys([*item.shards, *item.attention], unkept)
            n_made += unkept is None and bool(item.shards or item.attention)
            n_failed += bool(failed)
            for layer, error in failed.items():
                faults[layer][f"problem {item.problem_id}"] = error
            is_last = item.progress.n_texts_done == item.progress.n_texts
            if is_last or time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _log.info("activations %s %s: %s", model, setting, item.progress.render())
            if not n_made and n_failed == MAX_VAIN_TEXTS:
                left = item.progress.n_texts - item.progress.n_texts_done
                kind = type(next(iter(failed.values())))
                error = kind(
                    f"the first {n_failed} texts all failed, so {left} others were not run",
                    f"model {model}, {setting}",
                    "mend what failed in the first ones",
                )
                for layer in _layers(tasks) if left else ():
                    faults[layer]["the others"] = error
                break
        return dict(faults)


def _commit(
    plan: Plan,
    model: str,
    setting: str,
    item: Extracted,
    held: Mapping[str, Held],
    provenance: Mapping[str, Any],
) -> None:
    """Commit what one text leaves behind, an artifact a kind, without what is there already."""
    storage = plan.study.activations.storage
    ranges: dict[str, tuple[float, float]] = {}
    for layer, shard in item.shards.items():
        for pooling, (low, high) in shard.ranges.items():
            ranges[tensor_name(layer, pooling)] = (low, high)
            if shard.tensors[pooling].dtype != getattr(torch, storage):
                _log.warning(
                    "%s %s problem %d, layer %d, %s: %.3g does not fit %s, stored as float32",
                    *(model, setting, item.problem_id, layer, pooling, max(-low, high), storage),
                )
    made: dict[str, dict[int, ActivationShard] | dict[int, AttentionShard]] = {
        "activation_shards": item.shards,
        "attention_shards": item.attention,
    }
    for kind, shards in made.items():
        if not shards:
            continue
        there = held[kind][item.problem_id]
        tensors = {n: each for n, each in text_tensors(shards).items() if n not in there}
        about = dict(provenance)
        if kind == "activation_shards":
            about["ranges"] = {name: ranges[name] for name in ranges if name in tensors}
        (input_sha256,) = {shard.input_sha256 for shard in shards.values()}
        plan.commit(
            plan.shard(kind, model, setting, item.problem_id, input_sha256, list(tensors)),
            partial(write_text, file=FILES[kind], tensors=tensors),
            about,
            estimate_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        )


def _cost(tasks: Sequence[TextTask], options: ExtractOptions, loaded: LoadedModel) -> str:
    shape = BlockShape.of(loaded.module.config)
    kept: dict[str, int] = defaultdict(int)
    for task in tasks:
        n_sentences = len(task.spans)
        n_in_spans = sum(end - start for start, end in task.spans)
        for pooling in options.poolings:
            n_bytes = bytes_of(pooling, n_sentences, n_in_spans, loaded.d_model, options.storage)
            kept[pooling] += n_bytes * len(task.layers)
        mode = options.attention
        n_bytes = attention_bytes(mode.kind, shape.n_heads, n_sentences, mode.last_n)
        kept["attention"] += n_bytes * len(task.attention_layers)
    return cost_line(
        len(tasks),
        sum(len(task.token_ids) for task in tasks),
        sum(pass_flop(shape, [len(task.token_ids)], task.deepest + 1) for task in tasks),
        {name: n_bytes for name, n_bytes in kept.items() if n_bytes},
    )


def _provenance(plan: Plan, model: str, setting: str, loaded: LoadedModel) -> dict[str, Any]:
    return {
        **checkpoint_provenance(plan, model, setting),
        "text_view": plan.study.spans.text_view,
        "devices": [str(device) for device in loaded.devices],
        "dtype_computed": str(loaded.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
