"""Activations and vertical attention of any set of cells: one pass per text, one shard per problem.

Cells are grouped by model, so the weights are loaded once; each text runs once, whatever the number
of layers that still lack it; and every (site, setting, problem) shard is committed as soon as it
exists. On a CPU a kill therefore costs one text; on an accelerator, which runs several texts at
once and the next ones meanwhile, the packs in flight. A longer layer list extracts only what is
missing. A text that fails costs its own shards, and the indexes of the cells that want them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import polars as pl
import torch
import transformers

from taprobe_core.activations.cost import attention_bytes, bytes_of, cost_line, pass_flop
from taprobe_core.activations.extraction import Extracted, extract
from taprobe_core.activations.gemm_rate import BlockShape
from taprobe_core.activations.tasks import (
    ActivationShard,
    AttentionShard,
    ExtractOptions,
    TextTask,
    shard_file,
    tasks_of,
)
from taprobe_core.attention.mode import AttentionMode
from taprobe_core.checkpoints import (
    LoadedModel,
    load_base_model,
    pick_devices,
    resolve_checkpoint,
)
from taprobe_core.errors import TaprobeError, attempted
from taprobe_core.keys import Site
from taprobe_core.pipeline.commit import checkpoint_provenance
from taprobe_core.pipeline.plan import Plan
from taprobe_core.store import ArtifactKey, Committer, CommitWorkers, FileCommit, workers_for

_log = logging.getLogger(__name__)

Faults = dict[int, dict[str, TaprobeError]]
"""Layer -> problem -> why its shard could not be made; the problem is empty where none could be."""

MAX_VAIN_TEXTS = 10
"""Texts that may fail at the start with no shard made: by then it is the model, not the texts."""

_SECONDS_BETWEEN_LINES = 5


class Ready(NamedTuple):
    """One setting of a model, whose texts have all gone through it.

    Attributes:
        setting: the setting.
        sites: of the model, that are asked for.
        texts: `tables.TEXTS`; None where they could not be read.
        new: layers of which an activation shard was missing.
        faults: what failed, by layer.
    """

    setting: str
    sites: list[Site]
    texts: pl.DataFrame | None
    new: frozenset[int]
    faults: Faults


def index_faults(plan: Plan, site: Site, ready: Ready) -> dict[str, TaprobeError]:
    """Return why a cell's index cannot be committed; nothing where all its shards are there."""
    faults = ready.faults.get(site.layer, {})
    # A text may have failed where only its attention was missing.
    if faults and ready.texts is not None:
        keys = shard_keys(plan, site, ready.setting, ready.texts)
        return {} if are_there(plan, keys) else faults
    return faults


def are_there(plan: Plan, keys: Sequence[ArtifactKey]) -> bool:
    """Whether the store holds all of some artifacts."""
    return all(plan.store.backend.sizes(key) is not None for key in keys)


def extract_missing(
    plan: Plan, cells: Sequence[tuple[Site, str]]
) -> dict[tuple[str, str], dict[str, TaprobeError]]:
    """Extract every shard that the cells lack, of activations and of vertical attention.

    Args:
        plan: the plan.
        cells: (site, setting) pairs in any order.

    Returns:
        Each cell of which something failed -> problem -> its error.
    """
    return {
        (str(site), ready.setting): ready.faults[site.layer]
        for ready in extracted(plan, cells)
        for site in ready.sites
        if ready.faults.get(site.layer)
    }


def extracted(plan: Plan, cells: Sequence[tuple[Site, str]]) -> Iterator[Ready]:
    """Yield each setting of each model once what can be made of its shards is there."""
    grouped: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site, setting in cells:
        grouped[site.model][setting].append(site)
    for model, by_setting in grouped.items():
        with _Extraction(plan, model) as extraction:
            for setting, sites in by_setting.items():
                where = f"activations {model}, {setting}"
                ready = attempted(partial(_ready, plan, extraction, setting, sites), where)
                if isinstance(ready, TaprobeError):
                    faults: Faults = {site.layer: {"": ready} for site in sites}
                    ready = Ready(setting, sites, None, frozenset(), faults)
                yield ready


def _ready(plan: Plan, extraction: _Extraction, setting: str, sites: list[Site]) -> Ready:
    artifact = plan.open("spans", (extraction.model, setting))
    texts, spans = (artifact.read_table(f"{n}.parquet") for n in ("texts", "spans"))
    layers = _missing_layers(plan, plan.activation_shard, setting, sites, texts)
    attention = (
        _missing_layers(plan, plan.attention_shard, setting, sites, texts)
        if plan.study.attention.mode != "off"
        else {}
    )
    tasks = tasks_of(texts, spans, layers, attention)
    faults: Faults = {}
    if tasks:
        where = f"activations {extraction.model}, {setting}"
        ran = attempted(partial(extraction.run, setting, tasks), where)
        if isinstance(ran, TaprobeError):
            # A layer that lacks nothing is there whatever became of the others.
            ran = {layer: {"": ran} for layer in _layers(tasks)}
        faults = ran
    new = frozenset(layer for missing in layers.values() for layer in missing)
    return Ready(setting, sites, texts, new, faults)


def _layers(tasks: Sequence[TextTask]) -> set[int]:
    return {layer for task in tasks for layer in (*task.layers, *task.attention_layers)}


class _Extraction:
    """One model, loaded when a first text has to run, and what commits its shards meanwhile."""

    def __init__(self, plan: Plan, model: str) -> None:
        self.model = model
        self._plan = plan
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

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
        loaded = load_base_model(files, spec, self._devices)
        plan.check_model(self.model)
        return loaded

    @cached_property
    def _devices(self) -> tuple[torch.device, ...]:
        return pick_devices(self._plan.study.activations.device)

    @cached_property
    def _committer(self) -> Committer:
        workers = None
        # An accelerator goes on meanwhile; a CPU has nothing to spare, so its passes wait.
        if self._devices[0].type == "cuda":
            workers = self._open.enter_context(
                closing(CommitWorkers(workers_for(len(self._devices))))
            )
        return self._open.enter_context(Committer(self._plan.store, workers))

    def run(self, setting: str, tasks: list[TextTask]) -> Faults:
        """Commit the shards of texts; return why others could not be made."""
        plan, model = self._plan, self.model
        committer = self._committer  # its processes start while the weights load
        loaded = self._loaded
        study = plan.study.activations
        mode = AttentionMode(plan.study.attention.mode, plan.study.attention.last_n)
        options = ExtractOptions(study.poolings, study.storage, mode, study.token_budget)
        _log.info("activations %s %s: %s", model, setting, _cost(tasks, options, loaded))
        provenance = _provenance(plan, model, setting, loaded)
        said = time.monotonic()
        faults: Faults = defaultdict(dict)
        n_made = n_failed = 0
        items = extract(loaded.modules, tasks, options, keeps_faults=True)
        for item in items:
            committer.put(_shard_commits(plan, model, setting, item, provenance))
            n_made += len(item.shards) + len(item.attention)
            n_failed += bool(item.faults)
            for layer, error in item.faults.items():
                faults[layer][f"problem {item.problem_id}"] = error
            is_last = item.progress.n_texts_done == item.progress.n_texts
            if is_last or time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _log.info("activations %s %s: %s", model, setting, item.progress.render())
            if not n_made and n_failed == MAX_VAIN_TEXTS:
                left = item.progress.n_texts - item.progress.n_texts_done
                kind = type(next(iter(item.faults.values())))
                error = kind(
                    f"the first {n_failed} texts all failed, so {left} others were not run",
                    f"model {model}, {setting}",
                    "mend what failed in the first ones",
                )
                for layer in _layers(tasks) if left else ():
                    faults[layer]["the others"] = error
                break
        committer.flush()
        return dict(faults)


def _shard_commits(
    plan: Plan, model: str, setting: str, item: Extracted, provenance: Mapping[str, Any]
) -> list[FileCommit]:
    """Return a commit for every shard of a text.

    Args:
        plan: names the shards.
        model: the model.
        setting: the setting.
        item: from `extract`; its tensors must stay as they are until they are committed.
        provenance: what every manifest says of them.
    """

    def commit_of(
        key: ArtifactKey, shard: ActivationShard | AttentionShard, found: Mapping[str, Any]
    ) -> FileCommit:
        name, parts = shard_file(shard)
        about = {**provenance, "layer": shard.layer, **found}
        return FileCommit(
            key, name, parts, about, plan.stages.code_version(key.stage), plan.config_of(key)
        )

    commits = []
    for layer, shard in item.shards.items():
        if shard.dtype != plan.study.activations.storage:
            _log.warning(
                "%s %s problem %d, layer %d: %.3g does not fit %s, stored as float32",
                *(model, setting, item.problem_id, layer, shard.max_abs),
                plan.study.activations.storage,
            )
        sha256, site = shard.input_sha256, Site(model, layer)
        key = plan.activation_shard(site, setting, item.problem_id, sha256)
        found = {"dtype_stored": shard.dtype, "range": list(shard.range), "max_abs": shard.max_abs}
        commits.append(commit_of(key, shard, found))
    for layer, mass in item.attention.items():
        sha256, site = mass.input_sha256, Site(model, layer)
        key = plan.attention_shard(site, setting, item.problem_id, sha256)
        commits.append(commit_of(key, mass, {}))
    return commits


def shard_keys(
    plan: Plan, site: Site, setting: str, texts: pl.DataFrame, kind: str = "activation_shard"
) -> list[ArtifactKey]:
    """Keys of one cell's shards, in the order of the texts.

    Args:
        plan: the plan.
        site: model and layer.
        setting: the setting.
        texts: `tables.TEXTS`.
        kind: `activation_shard` or `attention_shard`.
    """
    key_of = getattr(plan, kind)
    return [
        key_of(site, setting, problem_id, input_sha256)
        for problem_id, input_sha256 in texts.select("problem_id", "input_sha256").iter_rows()
    ]


def _missing_layers(
    plan: Plan, key_of: Any, setting: str, sites: Sequence[Site], texts: pl.DataFrame
) -> dict[int, list[int]]:
    """Problem id -> layers that no shard holds yet; problems without any are left out."""
    missing: dict[int, list[int]] = defaultdict(list)
    for site in sites:
        keys = shard_keys(plan, site, setting, texts, key_of.__name__)
        for problem_id, key in zip(texts["problem_id"], keys, strict=True):
            # Adopted, since a kill between a shard's name and its partition's pointer leaves the
            # first without the second.
            if plan.store.adopt(key) is None:
                missing[problem_id].append(site.layer)
    return dict(missing)


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
