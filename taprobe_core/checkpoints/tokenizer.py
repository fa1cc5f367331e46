"""Load the tokenizer that a model's texts are read with.

Always a fast tokenizer, straight from its `tokenizer.json`: offsets are exact and no code of the
checkpoint's author runs. Where a BOS token is named, a text begins with exactly one, put there by
`spans`. Invariant: every id of a loaded tokenizer has a row in the checkpoint's embedding, and what
the checkpoint itself says of its tokens holds for it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from taprobe_core.checkpoints.folder import CheckpointFiles
from taprobe_core.checkpoints.origin import CONFIG_FILES, checkpoint_origin
from taprobe_core.checkpoints.quiet import quiet_transformers
from taprobe_core.checkpoints.tokenizer_files import (
    TokenizerFiles,
    find_tokenizer,
    special_tokens,
    token_ids,
)
from taprobe_core.checkpoints.tokenizer_match import check_match
from taprobe_core.errors import ModelError
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
    found = find_tokenizer(model)
    return _bos_token(found, tuple(file_sha256(found.folder / name) for name in found.names))


def tokenizer_sha256(model: Model) -> str:
    """Return the sha256 of a model's `tokenizer.json`, read once per process.

    Args:
        model: the model of the study.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
    """
    return file_sha256(find_tokenizer(model).path)


def vocabulary_size(model: Model) -> int:
    """Return the largest token id of a model's tokenizer plus one.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelError: a `tokenizer.json` without a vocabulary.
    """
    found = find_tokenizer(model)
    return _largest_id(found.path, found.remedy, file_sha256(found.path)) + 1


@cache
def _bos_token(files: TokenizerFiles, sha256: tuple[str, ...]) -> str | None:
    del sha256  # part of the cache's key
    return special_tokens(files).get("bos_token")


@cache
def _largest_id(path: Path, remedy: str, sha256: str) -> int:
    del sha256  # part of the cache's key
    return max(token_ids(path, remedy).values())


def _load(files: TokenizerFiles) -> PreTrainedTokenizerFast:
    special = special_tokens(files)
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
