"""Load the tokenizer that a model's texts are read with.

Always a fast tokenizer, straight from its `tokenizer.json`: offsets are exact and no code of the
checkpoint's author runs. Where a BOS token is named, a text begins with exactly one, put there by
`spans`. Invariant: every id of a loaded tokenizer has a row in the checkpoint's embedding, and what
the checkpoint itself says of its tokens holds for it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from taprobe_core.checkpoints.folder import CheckpointFiles
from taprobe_core.checkpoints.origin import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    HubRepository,
    checkpoint_origin,
    pinned_origin,
)
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.checkpoints.tokenizer_files import (
    TokenizerFiles,
    check_match,
    find_tokenizer,
    read_special_tokens,
    token_ids,
    tokenizer_origin,
)
from taprobe_core.errors import ModelError
from taprobe_core.store import UNPINNED, Pins
from taprobe_core.store.integrity import file_sha256
from taprobe_core.study import Model, StandInCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(
    model: Model, files: CheckpointFiles | None = None
) -> tuple[PreTrainedTokenizerFast, str]:
    """Load a model's tokenizer; neither truncates nor pads.

    Args:
        model: the model of the study.
        files: the checkpoint, if it is at hand; None fetches its configuration alone.

    Returns:
        The tokenizer, whose `bos_token` is None where the model has none, and the sha256 of its
        `tokenizer.json`.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelMismatchError: it is another model's; its BOS token is not in its vocabulary, or no
            file says whether it has one.
        ModelError: the tokenizer cannot be read.
    """
    found = find_tokenizer(model)
    tokenizer = _load(found)
    folder = _checkpoint_folder(model, files)
    if folder is not None:  # a stand-in's embedding is made to fit the tokenizer
        check_match(found, folder)
    return tokenizer, file_sha256(found.path)


def bos_token(model: Model) -> str | None:
    """Return the token that every text of a model begins with; None where it has none.

    Args:
        model: the model of the study.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError, ModelMismatchError, ModelError: as `load_tokenizer`.
    """
    return dict(_special_tokens(*_hashed(find_tokenizer(model)))).get("bos_token")


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
    folder, origin = find_tokenizer(model).folder, tokenizer_origin(model)
    files = {name: folder / name for name in TOKENIZER_FILES}
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
    return json.dumps(dict(_special_tokens(*_hashed(find_tokenizer(model)))))


def vocabulary_size(model: Model) -> int:
    """Return the largest token id of a model's tokenizer plus one."""
    found = find_tokenizer(model)
    return _largest_id(found.path, found.remedy, file_sha256(found.path)) + 1


def _hashed(files: TokenizerFiles) -> tuple[TokenizerFiles, tuple[str, ...]]:
    return files, tuple(file_sha256(files.folder / name) for name in files.names)


@cache
def _special_tokens(files: TokenizerFiles, sha256: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    del sha256  # part of the cache's key
    return tuple(sorted(read_special_tokens(files).items()))


@cache
def _largest_id(path: Path, remedy: str, sha256: str) -> int:
    del sha256  # part of the cache's key
    return max(token_ids(path, remedy).values())


def _load(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    special = read_special_tokens(files)
    from transformers import PreTrainedTokenizerFast

    try:
        with quiet_transformers():
            tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
                tokenizer_file=str(files.path), clean_up_tokenization_spaces=False, **special
            )
    except Exception as error:  # the library beneath raises nothing narrower
        raise ModelError(
            f"a tokenizer that cannot be read ({error})", str(files.path), files.remedy
        ) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _checkpoint_folder(model: Model, files: CheckpointFiles | None) -> Path | None:
    if isinstance(model.checkpoint, StandInCheckpoint):
        return None
    if files is not None:
        return files.folder
    return checkpoint_origin(model.checkpoint, model.rollouts_dir).fetch(CONFIG_FILES)
