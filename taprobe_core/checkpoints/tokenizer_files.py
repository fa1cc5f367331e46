"""The files of a model's tokenizer, and what they say of its vocabulary and its BOS token.

JSON alone: no tokenizer is built and no library asked. A model either begins its texts with one BOS
token or, as the Qwen family does, with none; its files say which. Invariant: a text gets a BOS
token only if a file names it, and none only if a file that could name one is there and does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.checkpoints.folder import refuse_code
from taprobe_core.checkpoints.origin import (
    TOKENIZER_FILES,
    Origin,
    checkpoint_origin,
    locate,
)
from taprobe_core.checkpoints.reading import check_regular, read_json
from taprobe_core.checkpoints.tokenizer_bounds import check_growth
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError, ModelMissingError
from taprobe_core.study import Model, StandInCheckpoint

_VOCABULARY, *_SETTINGS = TOKENIZER_FILES
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_SLOW = frozenset({"tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on this machine.

    Attributes:
        folder: holds `tokenizer.json`.
        names: the files of it that are read, `tokenizer.json` first.
        unfetched: names of settings that the origin holds but this machine does not.
        remedy: what repairs missing or damaged files.
    """

    folder: Path
    names: tuple[str, ...]
    unfetched: frozenset[str]
    remedy: str

    @property
    def path(self) -> Path:
        """Its `tokenizer.json`."""
        return self.folder / _VOCABULARY


def find_tokenizer(model: Model) -> TokenizerFiles:
    """Find a model's tokenizer, and fetch it if it is of a hub.

    Args:
        model: the model of the study.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
        ModelMissingError: no `tokenizer.json`.
        ModelMismatchError: a slow tokenizer only.
        ModelError: `tokenizer.json` is no regular file.
    """
    origin = tokenizer_origin(model)
    folder, listing = origin.fetch((_VOCABULARY,), optional=_SETTINGS), origin.listing()
    present = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if _VOCABULARY not in present:
        slow = sorted((present | listing) & _SLOW)
        if slow:
            raise ModelMismatchError(
                f"a slow tokenizer ({', '.join(slow)}), which gives no exact offsets",
                str(folder),
                "set tokenizer to a folder or a hub id that has tokenizer.json",
            )
        raise ModelMissingError(f"no {_VOCABULARY}", str(folder), origin.remedy)
    check_regular(folder / _VOCABULARY, origin.remedy)
    return TokenizerFiles(
        folder,
        tuple(name for name in TOKENIZER_FILES if name in present),
        frozenset(name for name in _SETTINGS if name in listing - present),
        origin.remedy,
    )


def token_ids(path: Path, remedy: str) -> dict[str, int]:
    """Return the id of each token of a `tokenizer.json`, added ones included.

    Args:
        path: the file.
        remedy: what repairs a damaged one.

    Raises:
        ModelError: it has no vocabulary.
    """
    return _ids(read_json(path, remedy), path, remedy)


def read_special_tokens(files: TokenizerFiles) -> dict[str, str]:
    """Return the special tokens by role; no `bos_token` where the tokenizer has none.

    `tokenizer_config.json` comes before `special_tokens_map.json`. Where neither names a BOS token,
    it is the token that the template of `tokenizer.json` puts before a text.

    Args:
        files: from `find_tokenizer`.

    Raises:
        ModelMismatchError: the BOS token is not in the vocabulary; the template puts several before
            a text; or no file says whether there is one.
        ModelMissingError: the file that says so has not been fetched.
        UnsafeModelError: a file names code.
        ModelError: a file cannot be read, or the tokenizer makes texts grow without bound.
    """
    content = read_json(files.path, files.remedy)
    ids = _ids(content, files.path, files.remedy)
    check_growth(content, files.path)
    stated: dict[str, Any] = {}
    for name in _SETTINGS:
        if name in files.names:
            config = read_json(files.folder / name, files.remedy)
            refuse_code(config, files.folder / name)
            for role in _SPECIAL:
                if stated.get(role) is None and role in config:
                    stated[role] = config[role]
        elif name in files.unfetched and "bos_token" not in stated:
            raise ModelMissingError(
                f"no {name}, which says whether texts begin with a BOS token",
                str(files.folder),
                files.remedy,
            )
    named = stated.get("bos_token")
    special = {role: _content(token) for role, token in stated.items()}
    if named is None:
        special["bos_token"] = _template_bos(content, files)
        if special["bos_token"] is None and len(files.names) == 1:
            raise ModelMismatchError(
                "no file that says whether texts begin with a BOS token",
                str(files.folder),
                "put a tokenizer_config.json beside it that names bos_token, or has it as null "
                "where the model has none",
            )
    bos = special.get("bos_token")
    if (named is not None or bos is not None) and bos not in ids:
        raise ModelMismatchError(
            f"no BOS token in the vocabulary (bos_token: {bos or named!r})",
            str(files.folder),
            "name one of its tokens as bos_token in tokenizer_config.json, or set it to null where "
            "the model has none",
        )
    # A special token outside the vocabulary would be added to it, beyond the embedding.
    return {role: token for role, token in special.items() if token is not None and token in ids}


def tokenizer_origin(model: Model) -> Origin:
    """Return where a model's tokenizer comes from.

    Raises:
        ConfigError: a stand-in checkpoint without `tokenizer`.
    """
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


def _ids(content: Mapping[str, Any], path: Path, remedy: str) -> dict[str, int]:
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model lists pieces with their scores
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        ids = {str(token): int(index) for token, index in (vocabulary | added).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError("a tokenizer without a vocabulary", str(path), remedy) from error
    if not ids:
        raise ModelError("a tokenizer without a vocabulary", str(path), remedy)
    return ids


def _content(token: Any) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template_bos(content: Mapping[str, Any], files: TokenizerFiles) -> str | None:
    """The token that the post-processor puts before a text, if it does."""
    try:
        processor = content.get("post_processor") or {}
        steps = processor["processors"] if processor.get("type") == "Sequence" else [processor]
        leading = [token for step in steps for token in _leading(step)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            "a post_processor that cannot be read", str(files.path), files.remedy
        ) from error
    if len(leading) > 1:
        raise ModelMismatchError(
            f"a template that puts {len(leading)} tokens before a text ({', '.join(leading)})",
            f"{files.path}, post_processor",
            "name the one BOS token in tokenizer_config.json, if the texts hold the others",
        )
    return leading[0] if leading else None


def _leading(step: Mapping[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [str(step["cls"][0])]
    if kind != "TemplateProcessing":
        return []
    leading: list[str] = []
    for piece in step["single"]:
        if "SpecialToken" not in piece:
            return leading
        leading += map(str, step["special_tokens"][piece["SpecialToken"]["id"]]["tokens"])
    return leading
