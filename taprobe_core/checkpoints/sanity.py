"""What a model configuration may say: sizes that a model can have, a dtype, its own weights.

A configuration is another's file. The library that reads it divides by its numbers, makes lists of
their length and looks its dtype up as an attribute, so each is looked at here first and refused by
name. Whether weights fit the configuration belongs in `loading`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from taprobe_core.errors import ModelError

_MOST_BLOCKS = 10_000
_MOST_HEADS = 65_536
_MOST_WIDTH = 2**24
_MOST_POSITIONS = 2**40

_MOST: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _MOST_BLOCKS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
        _MOST_HEADS,
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "head_dim", "intermediate_size", "vocab_size"),
        _MOST_WIDTH,
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _MOST_POSITIONS),
}
_LANGUAGE_MODELS = ("text_config", "language_config", "llm_config", "thinker_config")
_DTYPE = re.compile(r"(torch\.)?(auto|b?float(16|32|64)?|half|double|float8_\w+|u?int\d+)")
_FIX = "correct it, or fetch the checkpoint's own config.json again"


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a configuration that no model can be built from.

    Args:
        config: of a `config.json`.
        where: the file, for messages.

    Raises:
        ModelError: a size that is not a whole number from 1 to what its kind may be, key-value
            heads that do not divide the heads, a dtype that is none, or weights under a name of
            the configuration's own choice.
    """
    for path, part in _parts(config):
        for name, found in part.items():
            field = f"{path}{name}"
            if name in _MOST:
                _check_size(found, field, _MOST[name], where)
            if name in ("torch_dtype", "dtype") and found is not None:
                _check_dtype(found, field, where)
            if name == "transformers_weights" and found is not None:
                raise ModelError(
                    f"{field}: {found!r}, another file than those that are checked and hashed",
                    f"{where}, {field}",
                    "name the weights model.safetensors and remove the key",
                )
        _check_heads(part, path, where)


def _parts(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and those of its language models, with the way to each."""
    yield path, config
    for name in _LANGUAGE_MODELS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield from _parts(part, f"{path}{name}.")


def _check_size(found: Any, field: str, most: int, where: Path) -> None:
    # Some architectures list one size a block; null is the class's own default.
    for each in found if isinstance(found, list) else [found]:
        is_whole = isinstance(each, int) and not isinstance(each, bool)
        if each is not None and not (is_whole and 1 <= each <= most):
            raise ModelError(
                f"{field}: {each!r}, not a whole number from 1 to {most:,}",
                f"{where}, {field}",
                _FIX,
            )


def _check_dtype(found: Any, field: str, where: Path) -> None:
    # Some configurations give each of their parts a dtype of its own.
    for each in found.values() if isinstance(found, Mapping) else [found]:
        if not isinstance(each, str) or not _DTYPE.fullmatch(each):
            raise ModelError(
                f"{field}: {each!r}, which is no dtype",
                f"{where}, {field}",
                "name one like bfloat16, or remove the key",
            )


def _check_heads(part: Mapping[str, Any], path: str, where: Path) -> None:
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ModelError(
            f"num_attention_heads: {heads}, which {shared} num_key_value_heads do not divide",
            f"{where}, {path}num_key_value_heads",
            _FIX,
        )
