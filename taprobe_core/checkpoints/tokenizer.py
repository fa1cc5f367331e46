"""Find and load the tokenizer that a model's texts are read with.

Always a fast tokenizer, straight from its `tokenizer.json`: offsets are exact and no code of the
checkpoint's author runs. BOS must be named, since a text begins with exactly one, put there by
`spans`. Invariant: every id of a loaded tokenizer has a row in the checkpoint's embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taprobe_core.checkpoints.folder import (
    CheckpointFiles,
    read_config,
    read_json,
    refuse_code,
    stated_number,
)
from taprobe_core.checkpoints.origin import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    HubRepository,
    Origin,
    checkpoint_origin,
    locate,
)
from taprobe_core.checkpoints.pinned import pinned_origin
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError, ModelMissingError
from taprobe_core.store import UNPINNED, Pins
from taprobe_core.store.integrity import file_sha256
from taprobe_core.study import Model, StandInCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_SLOW = frozenset({"tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})


def load_tokenizer(
    model: Model, files: CheckpointFiles | None = None
) -> tuple[PreTrainedTokenizerFast, str]:
    """Load a model's tokenizer; neither truncates nor pads.

    Args:
        model: the model of the study.
        files: the checkpoint, if it is at hand; None fetches its configuration alone.

    Returns:
        The tokenizer, and the sha256 of its `tokenizer.json`.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelMismatchError: no BOS token, or an id beyond the checkpoint's embedding.
        ModelError: the tokenizer cannot be read.
    """
    path, remedy = _tokenizer_json(model)
    special = _special_tokens(path.parent, remedy)
    tokenizer = _load(path, special, remedy)
    if tokenizer.bos_token_id is None:
        raise ModelMismatchError(
            f"no BOS token in the vocabulary (bos_token: {special.get('bos_token')!r})",
            str(path.parent),
            "name one of its tokens as bos_token in tokenizer_config.json",
        )
    _check_rows(model, files, path, max(tokenizer.get_vocab().values()))
    return tokenizer, file_sha256(path)


def tokenizer_sha256(model: Model, pins: Pins = UNPINNED) -> str:
    """Return the sha256 of a model's `tokenizer.json`, and compare all files that decide tokens.

    Args:
        model: the model of the study.
        pins: what the files were at their first use.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelError: the files are not those of their first use.
    """
    path, _ = _tokenizer_json(model)
    origin = _origin(model)
    files = {name: path.parent / name for name in TOKENIZER_FILES}
    if isinstance(origin, HubRepository):  # what a cache lacks may still be fetched
        files = {name: file for name, file in files.items() if file.exists()}
    return pins.check(pinned_origin(origin, "tokenizer"), dict(files))["tokenizer.json"]


def special_tokens(model: Model) -> str:
    """Return as JSON what the files beside `tokenizer.json` say of special tokens: BOS and others.

    It decides how a text begins and which parts of it are one token, and no other hash has it.

    Args:
        model: the model of the study.

    Raises:
        ConfigError, ModelMissingError, ModelError: as `load_tokenizer`.
    """
    path, remedy = _tokenizer_json(model)
    return json.dumps(_special_tokens(path.parent, remedy), sort_keys=True)


def vocabulary_size(model: Model) -> int:
    """Return the largest token id of a model's tokenizer plus one.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelError: a `tokenizer.json` without a vocabulary.
    """
    path, remedy = _tokenizer_json(model)
    return _largest_id(path, remedy, file_sha256(path)) + 1


@cache
def _largest_id(path: Path, remedy: str, sha256: str) -> int:
    del sha256  # part of the cache's key
    return max(_ids(path, remedy).values())


def _ids(path: Path, remedy: str) -> dict[str, int]:
    content = read_json(path, remedy)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model lists pieces with their scores
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        ids = {str(token): int(index) for token, index in (vocabulary | added).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError("a tokenizer without a vocabulary", str(path), remedy) from error
    if not ids:
        raise ModelError("a tokenizer without a vocabulary", str(path), remedy)
    return ids


def _origin(model: Model) -> Origin:
    where = f"model {model.rollouts_dir}"
    if model.tokenizer is not None:
        return locate(model.tokenizer, None, f"{where}, tokenizer")
    if not isinstance(model.checkpoint, StandInCheckpoint):
        return checkpoint_origin(model.checkpoint, model.rollouts_dir)
    raise ConfigError(
        "a stand-in checkpoint without a tokenizer",
        f"{where}, tokenizer",
        "set it to a folder with tokenizer.json, or to a hub id org/name",
    )


def _tokenizer_json(model: Model) -> tuple[Path, str]:
    origin = _origin(model)
    path = origin.fetch(TOKENIZER_FILES) / "tokenizer.json"
    if not path.is_file():
        names = {file.name for file in path.parent.iterdir()} | origin.listing()
        slow = sorted(names & _SLOW)
        if slow:
            raise ModelMismatchError(
                f"a slow tokenizer ({', '.join(slow)}), which gives no exact offsets",
                str(path.parent),
                "set tokenizer to a folder or a hub id that has tokenizer.json",
            )
        raise ModelMissingError("no tokenizer.json", str(path.parent), origin.remedy)
    return path, origin.remedy


def _special_tokens(folder: Path, remedy: str) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name, remedy)
        refuse_code(config, folder / name)
        for key in _SPECIAL:
            token = _content(config.get(key))
            if token is not None:
                special.setdefault(key, token)
    return special


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load(path: Path, special: Mapping[str, str], remedy: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    # A special token outside the vocabulary would be added to it, beyond the embedding.
    tokens = _ids(path, remedy)
    known = {key: token for key, token in special.items() if token in tokens}
    try:
        with quiet_transformers():
            tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
                tokenizer_file=str(path), clean_up_tokenization_spaces=False, **known
            )
    except Exception as error:  # the library beneath raises nothing narrower
        raise ModelError(f"a tokenizer that cannot be read ({error})", str(path), remedy) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _check_rows(model: Model, files: CheckpointFiles | None, path: Path, largest_id: int) -> None:
    if files is not None:
        folder = files.folder
    elif not isinstance(model.checkpoint, StandInCheckpoint):
        origin = checkpoint_origin(model.checkpoint, model.rollouts_dir)
        folder = origin.fetch(CONFIG_FILES)
    else:
        return  # a stand-in's embedding is made to fit the tokenizer
    rows = stated_number(read_config(folder, "fetch the checkpoint again"), "vocab_size")
    if rows is not None and largest_id >= rows:
        raise ModelMismatchError(
            f"token id {largest_id} of {path}, where the embedding has {rows} rows",
            f"{folder / 'config.json'}, vocab_size",
            "give the model its own tokenizer: set tokenizer to null, or to the right folder",
        )
