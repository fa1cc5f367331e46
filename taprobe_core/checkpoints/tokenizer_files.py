"""The files of a model's tokenizer: its vocabulary, its BOS token, whether it fits the checkpoint.

JSON alone: no tokenizer is built, no library asked and no text read. A model either begins its
texts with one BOS token or, as the Qwen family does, with none; its files say which.

A normaliser that replaces a letter by a megabyte, or doubles it thirty times over, takes all of a
machine's memory in one call that nothing can stop. Its growth is bounded by its own rules, so it is
known before a text is read. Ids are only numbers, so a tokenizer of another model with few enough
of them would be read without a complaint; so its ids are compared with the rows of the embedding,
with the ids that the configuration names and with the vocabulary that lies beside the weights. What
these leave open cannot be told.

Invariant: a text gets a BOS token only if a file names it, and none only if a file that could name
one is there and does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taprobe_core.checkpoints.folder import (
    check_regular,
    read_config,
    read_json,
    refuse_code,
    stated_number,
)
from taprobe_core.checkpoints.origin import TOKENIZER_FILES, Origin, checkpoint_origin, locate
from taprobe_core.errors import ConfigError, ModelError, ModelMismatchError, ModelMissingError
from taprobe_core.store.integrity import file_sha256
from taprobe_core.study import Model, StandInCheckpoint

MOST_GROWTH = 64
"""Characters that a normaliser may make of one. Real ones replace one by one, or by two or three;
Unicode's own forms make 18 at most."""

_MOST_AFFIX = 64
"""Characters of what a model puts to a piece of a word, or a normaliser before a text."""

_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "prefix", "suffix", "replacement")


def check_growth(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a tokenizer that may make a text longer by more than `MOST_GROWTH` times."""
    growth = 1.0
    try:
        for step in _steps(content.get("normalizer")):
            growth *= _growth(step)
        parts = [content["model"], *_steps(content.get("pre_tokenizer"), "pretokenizers")]
        affix = max((len(part.get(name) or "") for part in parts for name in _AFFIXES), default=0)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            "a tokenizer of a form that is not known", str(path), "fetch the model's own again"
        ) from error
    if growth > MOST_GROWTH:
        raise ModelError(
            f"a normaliser that may make {growth:,.0f} characters of one (at most {MOST_GROWTH} "
            "are taken)",
            f"{path}, normalizer",
            "use the model's own tokenizer.json",
        )
    if affix > _MOST_AFFIX:
        raise ModelError(
            f"a tokenizer that puts {affix:,} characters to each piece of a text (at most "
            f"{_MOST_AFFIX} are taken)",
            str(path),
            "use the model's own tokenizer.json",
        )


def _steps(part: Any, inner: str = "normalizers") -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normaliser or a pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return
    if part.get("type") == "Sequence":
        for each in part[inner]:
            yield from _steps(each, inner)
    else:
        yield part


def _growth(step: Mapping[str, Any]) -> float:
    if step.get("type") == "Prepend":
        return 1.0 if len(step["prepend"]) <= _MOST_AFFIX else float(len(step["prepend"]))
    if step.get("type") != "Replace":
        return 1.0
    new, pattern = len(step["content"]), step["pattern"]
    if "String" in pattern:
        # An empty one matches before and after every character.
        return max(1.0, new / len(pattern["String"])) if pattern["String"] else 1.0 + 2 * new
    return 1.0 + new  # an expression may match nothing at all, between any two characters


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
    """Find a model's tokenizer, and fetch it if it is of a hub."""
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
    """Return the id of each token of a `tokenizer.json`, added ones included."""
    return _ids(read_json(path, remedy), path, remedy)


def read_special_tokens(files: TokenizerFiles) -> dict[str, str]:
    """Return the special tokens by role; no `bos_token` where the tokenizer has none.

    `tokenizer_config.json` comes before `special_tokens_map.json`. Where neither names a BOS token,
    it is the token that the template of `tokenizer.json` puts before a text.
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
    """Return where a model's tokenizer comes from."""
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


_MOST_UNUSED_ROWS = 4_096
_MOST_UNUSED_SHARE = 0.1
"""Embeddings are padded to round sizes and hold rows for tokens to come: at most 0.2 % of the rows
in the published models looked at. More than both of these is another model's vocabulary."""

_FIX = "give the model its own tokenizer: set tokenizer to null, or to the right folder"


def check_match(files: TokenizerFiles, checkpoint: Path) -> None:
    """Refuse a tokenizer that is not the checkpoint's."""
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
