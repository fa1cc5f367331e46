"""Is a tokenizer that of its checkpoint? What can be told without a text.

Ids are only numbers, so a tokenizer of another model with few enough of them would be read without
a complaint. Compared are: its ids with the rows of the embedding, the ids that the configuration
names, and the vocabulary that lies beside the weights. What these leave open cannot be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from taprobe_core.checkpoints.folder import read_config, stated_number
from taprobe_core.checkpoints.tokenizer_files import TokenizerFiles, token_ids
from taprobe_core.errors import ModelError, ModelMismatchError
from taprobe_core.store.integrity import file_sha256

_MOST_UNUSED_ROWS = 4_096
_MOST_UNUSED_SHARE = 0.1
"""Embeddings are padded to round sizes and hold rows for tokens to come: at most 0.2 % of the rows
in the published models looked at. More than both of these is another model's vocabulary."""

_FIX = "give the model its own tokenizer: set tokenizer to null, or to the right folder"


def check_match(files: TokenizerFiles, checkpoint: Path) -> None:
    """Refuse a tokenizer that is not the checkpoint's.

    Args:
        files: the tokenizer.
        checkpoint: folder with the checkpoint's `config.json`.

    Raises:
        ModelMismatchError: an id beyond the embedding, an embedding much larger than the
            vocabulary, an id in the configuration that the tokenizer lacks, or another vocabulary
            than the one beside the weights.
    """
    given = token_ids(files.path, files.remedy)
    largest = max(given.values())
    config = read_config(checkpoint, "fetch the checkpoint again")
    where = f"{checkpoint / 'config.json'}"
    rows = stated_number(config, "vocab_size")
    if rows is not None:
        if largest >= rows:
            raise ModelMismatchError(
                f"token id {largest} of {files.path}, where the embedding has {rows} rows",
                f"{where}, vocab_size",
                _FIX,
            )
        unused = rows - largest - 1
        if unused > max(_MOST_UNUSED_ROWS, _MOST_UNUSED_SHARE * rows):
            raise ModelMismatchError(
                f"an embedding of {rows} rows, of which {files.path} has no token for {unused}",
                f"{where}, vocab_size",
                _FIX,
            )
        for field, named in _named_ids(config):
            # A number beyond the embedding is a leftover of the class's defaults.
            inside = [each for each in named if each < rows]
            if inside and min(inside) > largest:
                raise ModelMismatchError(
                    f"{field} {min(inside)}, where the ids of {files.path} end at {largest}",
                    f"{where}, {field}",
                    _FIX,
                )
    _check_own(files, given, checkpoint)


def _named_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    text = config.get("text_config")
    for field in ("bos_token_id", "eos_token_id"):
        for part in (text if isinstance(text, Mapping) else {}, config):
            found = part.get(field)
            listed = found if isinstance(found, list) else [found]
            yield field, [each for each in listed if isinstance(each, int) and each >= 0]


def _check_own(files: TokenizerFiles, given: Mapping[str, int], checkpoint: Path) -> None:
    own_path = checkpoint / "tokenizer.json"
    if checkpoint == files.folder or not own_path.is_file():
        return
    hashes = file_sha256(files.path), file_sha256(own_path)
    if hashes[0] == hashes[1]:
        return
    try:
        own = token_ids(own_path, files.remedy)
    except ModelError:
        return  # a damaged one may be why the study names another
    token_of = {index: token for token, index in own.items()}
    for token, index in given.items():
        if own.get(token, index) != index or token_of.get(index, token) != token:
            raise ModelMismatchError(
                f"another vocabulary than the checkpoint's own: id {index} is {token!r}, there "
                f"{token_of.get(index)!r} (sha256 {hashes[0][:12]}, there {hashes[1][:12]})",
                str(files.path),
                _FIX,
            )
