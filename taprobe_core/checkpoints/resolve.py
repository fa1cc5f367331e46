"""From a study's model to a folder that may be loaded, and to the identity of its weights.

A pretrained checkpoint is a local folder or a hub snapshot; a stand-in is built once. The identity
says which weights, not where they are: a moved folder keeps it, a changed byte does not. How long a
text the model takes is read off its configuration, before any weight is loaded. Loading belongs in
`loading`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import constants

from taprobe_core.checkpoints.folder import (
    INDEX,
    WEIGHTS,
    CheckpointFiles,
    CheckpointFolder,
    files_to_load,
    folder_digest,
    inspect_folder,
    read_config,
    stated_number,
)
from taprobe_core.checkpoints.origin import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    HubRepository,
    LocalFolder,
    Origin,
    checkpoint_origin,
    pinned_origin,
    pinned_stand_in,
)
from taprobe_core.checkpoints.quiet import quiet_transformers, reason_of
from taprobe_core.checkpoints.stand_in import (
    build_stand_in,
    embedding_rows,
    stand_in_dimensions,
    stand_in_folder,
    stand_in_identity,
)
from taprobe_core.checkpoints.tokenizer import vocabulary_size
from taprobe_core.errors import ModelError, ModelMismatchError, ModelMissingError, UnsafeModelError
from taprobe_core.store import UNPINNED, Pins
from taprobe_core.store.local import file_sizes
from taprobe_core.store.manifest import MANIFEST_NAME
from taprobe_core.study import DemoCheckpoint, Model, StandInCheckpoint


class StatedConfig(SimpleNamespace):
    """A configuration of ours, which states all that is asked of it.

    It is read without transformers, which takes torch and seconds to import.
    """

    def get_text_config(self) -> StatedConfig:
        """Return itself: it is of a text model."""
        return self


def resolve_checkpoint(model: Model, build_root: Path, pins: Pins = UNPINNED) -> CheckpointFiles:
    """Fetch, find or build a model's checkpoint, inspect it and hash what will be loaded.

    Args:
        model: the model of the study.
        build_root: folder of the stand-ins.
        pins: what its files were at their first use.

    Raises:
        ModelMissingError: not on this machine and not to be had.
        ModelMismatchError: not as deep or as wide as the study says.
        UnsafeModelError: loading it would run code.
        ModelError: its files are damaged, or not those of their first use.
        DiskFullError: no space left to build or fetch it.
    """
    checkpoint = model.checkpoint
    if isinstance(checkpoint, StandInCheckpoint):
        rows = embedding_rows(vocabulary_size(model))
        path = build_stand_in(checkpoint, rows, build_root)
        folder = inspect_folder(path, f"remove {path}; it is built again")
        identity = _stand_in_identity(checkpoint, rows, build_root, pins)
    else:
        origin = checkpoint_origin(checkpoint, model.rollouts_dir)
        folder = inspect_folder(_fetch(origin), origin.remedy, origin.listing())
        if isinstance(origin, HubRepository):
            source = pinned_origin(origin, "checkpoint")
            pins.check(source, {name: folder.path / name for name in folder.files})
            identity = _hub_identity(origin, pins)
        else:
            identity = _folder_identity(origin, folder, pins)
    _check_shape(folder, model)
    return CheckpointFiles(folder.path, identity)


def check_present(model: Model) -> None:
    """Refuse a hub model that is not in the cache while the client is offline.

    Args:
        model: the model of the study.

    Raises:
        ModelMissingError: a file is not in the cache and cannot be fetched.
        ModelError: as `resolve_checkpoint`.
    """
    if isinstance(model.checkpoint, StandInCheckpoint) or not constants.is_offline_mode():
        return
    origin = checkpoint_origin(model.checkpoint, model.rollouts_dir)
    if isinstance(origin, HubRepository):
        inspect_folder(_fetch(origin), origin.remedy, origin.listing())


def checkpoint_identity(
    model: Model, build_root: Path | None = None, pins: Pins = UNPINNED
) -> dict[str, str]:
    """Return what `resolve_checkpoint` would, without fetching or building weights.

    A local folder is read through to hash it, once where there are pins and else once per process.
    Of a hub's model and of a stand-in only what is pinned already is compared. A null hub revision
    is resolved once per process.

    Args:
        model: the model of the study.
        build_root: folder of the stand-ins; None leaves them uncompared.
        pins: what its files were at their first use.

    Raises:
        ModelMissingError: no such folder, or a revision that cannot be resolved.
        UnsafeModelError: loading the folder would run code.
        ModelError: the files are damaged, or not those of their first use.
    """
    checkpoint = model.checkpoint
    if isinstance(checkpoint, StandInCheckpoint):
        rows = embedding_rows(vocabulary_size(model))
        return _stand_in_identity(checkpoint, rows, build_root, pins)
    origin = checkpoint_origin(checkpoint, model.rollouts_dir)
    if isinstance(origin, HubRepository):
        return _hub_identity(origin, pins)
    return _folder_identity(origin, inspect_folder(origin.path, origin.remedy), pins)


def checkpoint_config(model: Model) -> Any:
    """Return a checkpoint's configuration, without fetching or building weights.

    A hub model's `config.json` is fetched if the cache lacks it. Other people's configurations are
    read by transformers, which knows what they leave out.

    Args:
        model: the model of the study.

    Raises:
        ModelMissingError: no `config.json` on this machine, and it is not to be had.
        UnsafeModelError: it names code.
        ModelError: it is damaged, or of an architecture that transformers does not know.
    """
    checkpoint = model.checkpoint
    if isinstance(checkpoint, StandInCheckpoint):
        dimensions = stand_in_dimensions(checkpoint)
        return StatedConfig(model_type=checkpoint.architecture, **dimensions)
    origin = checkpoint_origin(checkpoint, model.rollouts_dir)
    folder = origin.fetch(CONFIG_FILES)
    stated = read_config(folder, origin.remedy)
    if isinstance(checkpoint, DemoCheckpoint):
        return StatedConfig(**stated)
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever another's numbers make the library raise
        raise ModelError(
            f"a configuration that transformers cannot read ({reason_of(error)})",
            str(folder / "config.json"),
            "check the file, and the transformers version",
        ) from error


def _fetch(origin: Origin) -> Path:
    """Return the folder with the files that are loaded; no other file of a hub is fetched."""
    folder = origin.fetch(CONFIG_FILES, optional=TOKENIZER_FILES)
    read_config(folder, origin.remedy)  # refused before gigabytes are fetched for it
    names = {file.name for file in folder.iterdir()} | origin.listing()
    if WEIGHTS not in names and INDEX in names:
        origin.fetch((INDEX,))
    if WEIGHTS in names or INDEX in names:
        origin.fetch(files_to_load(folder, origin.remedy, names))
    return folder


def _hub_identity(origin: HubRepository, pins: Pins) -> dict[str, str]:
    source = pinned_origin(origin, "checkpoint")
    pins.recheck(source)
    return {
        "kind": "hub",
        "repo": origin.repo,
        "revision": origin.revision,
        **pins.accepted_identity(source),
    }


def _folder_identity(origin: LocalFolder, folder: CheckpointFolder, pins: Pins) -> dict[str, str]:
    source = pinned_origin(origin, "checkpoint")
    # Of a bundled folder the manifest names files that decide nothing here, so that no list of
    # files is compared with it.
    listings = {"": folder.files} if source.expected is None else {}
    hashes = pins.check(source, {name: folder.path / name for name in folder.files}, listings)
    return {"kind": "folder", "sha256": folder_digest(folder, hashes)}


def _stand_in_identity(
    spec: StandInCheckpoint, rows: int, build_root: Path | None, pins: Pins
) -> dict[str, str]:
    identity = stand_in_identity(spec, rows)
    if build_root is None:
        return identity
    folder = stand_in_folder(spec, rows, build_root)
    source = pinned_stand_in(folder)
    if folder.is_dir():
        names = sorted(file_sizes(folder).keys() - {MANIFEST_NAME})
        pins.check(source, {name: folder / name for name in names}, {"": names})
    return {**identity, **pins.accepted_identity(source)}


def _check_shape(folder: CheckpointFolder, model: Model) -> None:
    depth = stated_number(
        folder.config, "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"
    )
    width = stated_number(folder.config, "hidden_size", "n_embd", "d_model")
    _check_number(folder, "num_hidden_layers", depth, "n_layers", model.n_layers)
    if model.d_model is not None:
        _check_number(folder, "hidden_size", width, "d_model", model.d_model)


def _check_number(
    folder: CheckpointFolder, field: str, found: int | None, key: str, asked: int
) -> None:
    if found is None:
        raise ModelMismatchError(
            f"a {folder.config.get('model_type')} configuration that does not state its {field}",
            str(folder.path / "config.json"),
            "use a decoder-only model whose configuration does",
        )
    if found != asked:
        raise ModelMismatchError(
            f"{field}: {found}, where the study says {key}: {asked}",
            f"{folder.path / 'config.json'}, {field}",
            f"set {key}: {found}",
        )


def context_length(model: Model) -> int | None:
    """Return the most tokens of a text that a model takes; None where its configuration is silent.

    A configuration that cannot be read sets no limit here: what is wrong with it is said when the
    model is loaded.

    Args:
        model: the model of the study.

    Raises:
        ModelMissingError: no `config.json` on this machine, and it is not to be had.
        UnsafeModelError: it names code.
    """
    try:
        config = checkpoint_config(model)
    except (ModelMissingError, UnsafeModelError):
        raise
    except ModelError:
        return None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
