"""The demo's own traces -> a small byte-level BPE tokenizer in the usual two files.

It behaves like the tokenizers of the real models where span code can go wrong: a blank stands in
front of its word's token, `.` and a blank line merge into one token across two sentences, longer
numbers may take several tokens, and no token is added by itself: BOS is the reader's business.
Invariant: the files depend on the arguments alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from taprobe_core.demo.policy import drawn_trace
from taprobe_core.demo.task import N_TASKS, problem, seeded

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
"""Special tokens; their ids are 0, 1 and 2."""

VOCAB_SIZE = 512
MAX_LENGTH = 1024
N_TRAINING_TRACES = 1000

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words with the blank before them, digits by threes, marks with the line ends after them: the
division that large models' byte-level tokenizers use."""


def train_tokenizer(folder: Path, seed: int, *, vocab_size: int = VOCAB_SIZE) -> None:
    """Train on traces of the policy; write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        vocab_size: at most this many tokens, special tokens and all 256 bytes included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    _write(folder / "tokenizer_config.json", json.dumps(_config(), indent=2))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)


def _texts(seed: int) -> list[str]:
    rng = seeded(seed, "tokenizer")
    drawn = [problem(rng.randrange(N_TASKS)) for _ in range(N_TRAINING_TRACES)]
    traces = [drawn_trace(some, rng) for some in drawn]
    return [
        some.prompt + trace.thinking + trace.ending
        for some, trace in zip(drawn, traces, strict=True)
    ]


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))
