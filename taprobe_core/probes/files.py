"""Probes on disk: `probes.safetensors` for arrays, `probes.json` for everything else.

JSON: `format`, `seed`, `recipe` (with its target), `terms` (every term that any fold chose, once,
alphabetical) and `probes`, one object per fold: `protocol`, `index`, `train`, `val`, `test`,
`n_iter`, `is_converged`, `early_stopping`, `arrays`. A tensor's name is the fold and the array,
`lopo_3.coef`; `lopo_3.terms` [term] int32 are that fold's terms as positions in `terms`.

What does not belong here: atomic publishing and hashes (`store`). Invariant: the same fit gives
the same bytes, and loaded probes hold bit-equal arrays. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from taprobe_core.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from taprobe_core.probes.fitted import FittedProbe, Training
from taprobe_core.probes.inputs import Arrays
from taprobe_core.splits import Fold
from taprobe_core.store import write_bytes
from taprobe_core.study import ControlRecipe, ProbeRecipe

FORMAT = 2
_ARRAYS, _REST = "probes.safetensors", "probes.json"
_FIT_AGAIN = "fit these probes again"


def save_probes(folder: Path, probes: Sequence[FittedProbe]) -> None:
    """Write the probes of one recipe into `folder`, which exists.

    Args:
        folder: receives `probes.safetensors` and `probes.json`.
        probes: one per fold, at least one.
    """
    first = probes[0]
    terms = sorted({term for probe in probes for term in probe.terms or ()})
    position = {term: index for index, term in enumerate(terms)}
    tensors = {}
    for probe in probes:
        arrays = dict(probe.arrays)
        if probe.terms is not None:
            arrays["terms"] = np.array([position[term] for term in probe.terms], dtype=np.int32)
        for name, array in arrays.items():
            tensors[f"{_prefix(probe.fold)}.{name}"] = np.ascontiguousarray(array)
    document = {
        "format": FORMAT,
        "seed": first.seed,
        "recipe": first.recipe.model_dump(mode="json"),
        "terms": terms,
        "probes": [_record(probe) for probe in probes],
    }
    # The library's own writer would let only its owner read the file, whatever the umask says.
    write_bytes(folder / _ARRAYS, save(tensors))
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True)
    (folder / _REST).write_text(text + "\n", encoding="utf-8")


def load_probes(folder: Path) -> list[FittedProbe]:
    """Read what `save_probes` wrote, in fold order.

    Raises:
        MissingArtifactError: a file is absent.
        StaleArtifactError: another version of this format.
        CorruptArtifactError: a file cannot be read, or the two do not belong together.
    """
    missing = [name for name in (_ARRAYS, _REST) if not (folder / name).is_file()]
    if missing:
        raise MissingArtifactError(f"no {' and no '.join(missing)}", str(folder), _FIT_AGAIN)
    try:
        document = json.loads((folder / _REST).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise StaleArtifactError(
                f"format is {document['format']}, this version reads {FORMAT}",
                str(folder / _REST),
                _FIT_AGAIN,
            )
        tensors = load_file(folder / _ARRAYS)
        kind = ControlRecipe if "control_seed" in document["recipe"] else ProbeRecipe
        recipe = kind.model_validate_json(json.dumps(document["recipe"]))
        return [_probe(document, recipe, record, tensors) for record in document["probes"]]
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise CorruptArtifactError(
            f"probes cannot be read ({type(error).__name__}: {error})", str(folder), _FIT_AGAIN
        ) from error


def _record(probe: FittedProbe) -> dict[str, Any]:
    fold, training = probe.fold, probe.training
    return {
        "protocol": fold.protocol,
        "index": fold.index,
        "train": list(fold.train),
        "val": list(fold.val),
        "test": list(fold.test),
        "n_iter": training.n_iter,
        "is_converged": training.is_converged,
        "early_stopping": training.early_stopping,
        "arrays": sorted(probe.arrays),
    }


def _probe(
    document: dict[str, Any], recipe: ProbeRecipe, record: dict[str, Any], tensors: Arrays
) -> FittedProbe:
    train, val, test = (tuple(record[side]) for side in ("train", "val", "test"))
    fold = Fold(record["protocol"], record["index"], train, val, test)
    prefix = _prefix(fold)
    terms = None
    if "text" in recipe.features:
        terms = tuple(document["terms"][position] for position in tensors[f"{prefix}.terms"])
    return FittedProbe(
        recipe=recipe,
        fold=fold,
        seed=document["seed"],
        arrays={name: tensors[f"{prefix}.{name}"] for name in record["arrays"]},
        terms=terms,
        training=Training(record["n_iter"], record["is_converged"], record["early_stopping"]),
    )


def _prefix(fold: Fold) -> str:
    return f"{fold.protocol}_{fold.index}"
