"""Join labels, spans, sentences, activations and attention into the rows that probes read.

One row per labelled sentence, sorted by (problem_id, sentence_idx). A problem without any span was
left out upstream: it is dropped here and reported, so that folds are made from `problems` and one
unreadable problem does not cost the others. Anything else that is missing is an error.

Blocks of features, float32:

- `position`, columns `POSITION_FEATURES`: `sentence_idx` counted from 0; `n_sentences`, labelled
  ones of the problem; `relative_position` = sentence_idx / max(n_sentences - 1, 1), in [0, 1];
  `n_tokens` of the sentence.
- `causal_position`, columns `CAUSAL_POSITION_FEATURES`: `sentence_idx`; `n_tokens_before`, from the
  first sentence's start to this one's; `n_tokens`.
- `vertical_attention`, columns `ProbeData.attention_columns`, see `join_features`.
- activations, one block per pooling, and token sets.

`LEAKY_FEATURES` and `LEAKY_BLOCKS` are known only when the trace has ended: the number of sentences
and what follows from it, and attention, which later sentences pay. They make a baseline stronger
than a reader of the running trace could be: good for asking whether activations say more, not
usable while a trace is being written.

Texts become weighted counts of words and word pairs by scikit-learn's vectorizer, with one step of
ours in between: its `max_features` breaks ties with an unstable sort, whose order differs between
instruction sets; `FrequentTerms` gives ties to the alphabetically earlier term. Invariant: the
terms chosen depend on the texts alone, those of a fold on its training texts alone.

What does not belong here: what is fitted (`targets`), and scaling, which is learned inside a fold
(`solvers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectorMixin
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, validate_data

from taprobe_core.errors import DataError, NonFiniteError, NotEnoughDataError
from taprobe_core.study.parts import Pooling

MAX_TERMS = 10_000
_NGRAMS = (1, 2)


class FrequentTerms(SelectorMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn is untyped
    """Keep the columns of the most frequent terms, in their order; ties go to the earlier column.

    Args:
        max_terms: at most so many.
    """

    def __init__(self, max_terms: int = MAX_TERMS) -> None:
        self.max_terms = max_terms

    def fit(self, X: csr_matrix, y: Any = None) -> Self:
        """Learn the columns from counts, [sentence, term]; `y` is ignored."""
        totals = np.asarray(validate_data(self, X, accept_sparse="csr").sum(axis=0)).ravel()
        self.support_ = np.zeros(len(totals), dtype=bool)
        self.support_[np.argsort(-totals, kind="stable")[: self.max_terms]] = True
        return self

    def _get_support_mask(self) -> NDArray[np.bool_]:
        check_is_fitted(self)
        return self.support_


def text_pipeline() -> Pipeline:
    """Return TF-IDF of the `MAX_TERMS` most frequent words and word pairs, unfitted.

    Words have two letters or more and are read in lower case; weights are scikit-learn's defaults.
    """
    return Pipeline(
        [
            ("count", CountVectorizer(ngram_range=_NGRAMS)),
            ("choose", FrequentTerms()),
            ("weigh", TfidfTransformer()),
        ]
    )


def has_words(texts: Sequence[str]) -> bool:
    """Say whether any text has a word that `text_pipeline` would count."""
    analyze = CountVectorizer().build_analyzer()
    return any(analyze(text) for text in texts)


def weigh_texts(texts: Sequence[str], terms: Sequence[str], idf: NDArray[np.float64]) -> csr_matrix:
    """Return what a fitted `text_pipeline` makes of `texts`, from its terms and weights alone.

    Args:
        texts: [sentence].
        terms: [term], the columns wanted.
        idf: [term], inverse document frequencies.

    Returns:
        [sentence, term] float64, each row of Euclidean length 1, or zero without any of the terms.
    """
    vectorizer = TfidfVectorizer(ngram_range=_NGRAMS, vocabulary=terms)
    vectorizer.idf_ = idf
    return vectorizer.transform(texts)


@dataclass(frozen=True, eq=False)
class FoldWords:
    """Counts of terms, and what every fold makes of them.

    The weights of a row in a fold are `counts * idf[fold]`, divided by their Euclidean length
    (zero without any of the fold's terms): what `text_pipeline`, fitted on the fold's training
    texts, gives.

    Attributes:
        terms: [term], alphabetical; those of any fold.
        counts: [sentence, term] float64.
        idf: [fold, term] float64, inverse document frequency ln((1 + n) / (1 + n_with)) + 1 among
            the n training texts of the fold; 0 where the fold does not use the term.
    """

    terms: tuple[str, ...]
    counts: csr_matrix
    idf: NDArray[np.float64]

    def terms_of(self, fold: int) -> tuple[str, ...]:
        """Return the terms that a fold uses, alphabetical, as `text_pipeline` would name them."""
        return tuple(self.terms[column] for column in np.flatnonzero(self.idf[fold]))


def fold_words(
    texts: Sequence[str], train: NDArray[np.bool_], max_terms: int = MAX_TERMS
) -> FoldWords:
    """Count terms once, and choose and weigh them for every fold on its training texts.

    Args:
        texts: [sentence].
        train: [fold, sentence] bool, the training texts of each fold.
        max_terms: at most so many per fold; the most frequent in its training texts, ties to the
            alphabetically earlier one.

    Raises:
        NotEnoughDataError: the training texts of a fold hold no word; names every such fold.

    Source:
        scikit-learn's TfidfTransformer with smooth_idf.
    """
    learns = csr_matrix(np.asarray(train, dtype=np.float64))
    wordless = list(range(len(train)))
    if has_words(texts):
        vectorizer = CountVectorizer(ngram_range=_NGRAMS, dtype=np.float64)
        counts = vectorizer.fit_transform(texts)
        totals = (learns @ counts).toarray()
        wordless = np.flatnonzero(~totals.any(axis=1)).tolist()
    if wordless:
        raise NotEnoughDataError(
            "the training sentences hold no word to count",
            f"folds {wordless}",
            "take text out of the recipe's features, or use more problems",
        )
    n_with = (learns @ (counts > 0)).toarray()
    n_train = np.asarray(train).sum(axis=1, keepdims=True)
    weights = np.log((1 + n_train) / (1 + n_with)) + 1
    for own, total in zip(weights, totals, strict=True):
        own[np.argsort(-total, kind="stable")[max_terms:]] = 0.0
        own[total == 0] = 0.0
    is_used = weights.any(axis=0)
    terms = vectorizer.get_feature_names_out()[is_used]
    return FoldWords(tuple(map(str, terms)), counts[:, is_used].tocsr(), weights[:, is_used])


POSITION_FEATURES = ("sentence_idx", "n_sentences", "relative_position", "n_tokens")
CAUSAL_POSITION_FEATURES = ("sentence_idx", "n_tokens_before", "n_tokens")
LEAKY_FEATURES = ("n_sentences", "relative_position")
LEAKY_BLOCKS = ("position", "vertical_attention")
"""Blocks of which a column, or every column, needs the whole trace."""

ByProblem = Mapping[int, NDArray[Any]]
"""Problem id -> rows of all its sentences, or tokens of all its sentences, in order."""

_KEY = ["problem_id", "sentence_idx"]
_SHOWN = 10


class TokenSets(NamedTuple):
    """Token states of the rows: row i has `values[offsets[i]:offsets[i + 1]]`.

    Attributes:
        values: [token, d_model], of the number type they were read in, finite.
        offsets: [sentence + 1] int64, from 0; every sentence has a token or more.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Features and labels of every labelled sentence; all members share their row order.

    Attributes:
        labels: `tables.LABELS`, the rows.
        texts: the sentences.
        position: [sentence, 4] float32, `POSITION_FEATURES`.
        causal_position: [sentence, 3] float32, `CAUSAL_POSITION_FEATURES`.
        activations: pooling -> [sentence, d_model] float32; those that were read.
        tokens: token states, or None.
        vertical_attention: [sentence, column] float32, or None.
        attention_columns: names of the columns of `vertical_attention`.
        dropped: labelled problems without spans, ascending.
    """

    labels: pl.DataFrame
    texts: list[str]
    position: NDArray[np.float32]
    causal_position: NDArray[np.float32]
    activations: Mapping[Pooling, NDArray[np.float32]] = field(default_factory=dict)
    tokens: TokenSets | None = None
    vertical_attention: NDArray[np.float32] | None = None
    attention_columns: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()

    @property
    def keys(self) -> pl.DataFrame:
        """problem_id and sentence_idx, Int64."""
        return self.labels.select(_KEY)

    @property
    def problem_id(self) -> NDArray[np.int64]:
        """[sentence] int64, ascending."""
        return self.labels["problem_id"].to_numpy()

    @property
    def problems(self) -> tuple[int, ...]:
        """Problems with rows, ascending; the `present` of `splits.make_folds`."""
        return tuple(int(problem_id) for problem_id in np.unique(self.problem_id))

    def rows(self, problem_ids: Iterable[int]) -> NDArray[np.intp]:
        """Return the row numbers of `problem_ids`, ascending."""
        return np.flatnonzero(np.isin(self.problem_id, list(problem_ids)))


def join_features(
    labels: pl.DataFrame,
    spans: pl.DataFrame,
    sentences: pl.DataFrame,
    activations: Mapping[Pooling, ByProblem] | None = None,
    attention: Mapping[str, pl.DataFrame] | None = None,
) -> ProbeData:
    """Join the tables of one (model, setting), and the activations and attention of one site.

    Vertical attention has one column `attention_score`, the simple score. Where scores of single
    heads are kept (mode `full`) it has, besides, one column per head, `head_<h>`, and the column
    `is_undefined`: 1 in the last sentences, which none stands far enough behind to score, where
    each head's mean over the defined sentences of the problem stands for its score (0 in a problem
    without any).

    Args:
        labels: `tables.LABELS`; decides which sentences become rows.
        spans: `tables.SPANS`; every span of a problem, labelled or not.
        sentences: `tables.SENTENCES`, for the text.
        activations: pooling -> problem_id -> [n_spans, d_model], row i belonging to sentence i; for
            `tokens` [number of tokens in all spans, d_model]. Problems without labels are ignored.
        attention: `scores` (`tables.ATTENTION_SCORES`) and, where kept, `vertical`
            (`tables.VERTICAL_SCORES`) of the site.

    Raises:
        NotEnoughDataError: no labelled problem has spans.
        DataError: a labelled sentence lacks its span, its text, its activation row or its
            attention, or shapes disagree; lists every fault.
        NonFiniteError: an activation is NaN or infinite; names pooling, problem and sentence.
    """
    labelled = set(labels["problem_id"].unique())
    dropped = tuple(sorted(labelled - set(spans["problem_id"].unique())))
    kept = labels.filter(~pl.col("problem_id").is_in(dropped)).sort(_KEY)
    if kept.is_empty():
        raise NotEnoughDataError(
            f"none of {len(labelled)} labelled problems has spans",
            "labels and spans",
            "see the skipped table of the spans stage for the reason of each problem",
        )
    own = spans.sort(_KEY)
    before = pl.col("start_token") - pl.col("start_token").first().over("problem_id")
    columns = own.select(*_KEY, "n_tokens", before.alias("n_tokens_before"))
    joined = _left_join(_left_join(kept, columns), sentences.select(*_KEY, "sentence"))
    faults = _uncovered(joined, "n_tokens", "span") + _uncovered(joined, "sentence", "text")
    for pooling, by_problem in (activations or {}).items():
        faults += _activation_faults(joined, own, pooling, by_problem)
    attended = None if attention is None else _attention(joined, attention)
    if attended is not None:
        faults += _uncovered(attended, "is_covered", "attention")
    if faults:
        raise DataError(
            f"labelled sentences are not covered: {'; '.join(faults)}",
            "labels, spans, sentences, activations and attention",
            "build these stages again from the same rollouts",
        )
    pooled: dict[Pooling, NDArray[np.float32]] = {
        pooling: _stack(joined, pooling, by_problem)
        for pooling, by_problem in (activations or {}).items()
        if pooling != "tokens"
    }
    tokens = (activations or {}).get("tokens")
    scores = None if attended is None else attended.drop(*_KEY, "is_covered")
    return ProbeData(
        labels=joined.select(labels.columns),
        texts=joined["sentence"].to_list(),
        position=_position(joined),
        causal_position=joined.select(CAUSAL_POSITION_FEATURES).cast(pl.Float32).to_numpy(),
        activations=pooled,
        tokens=None if tokens is None else _token_sets(joined, own, tokens),
        vertical_attention=None if scores is None else scores.cast(pl.Float32).to_numpy(),
        attention_columns=() if scores is None else tuple(scores.columns),
        dropped=dropped,
    )


def _left_join(rows: pl.DataFrame, columns: pl.DataFrame) -> pl.DataFrame:
    return rows.join(columns, on=_KEY, how="left", maintain_order="left")


def _position(joined: pl.DataFrame) -> NDArray[np.float32]:
    index = joined["sentence_idx"].to_numpy().astype(np.float32)
    count = joined["n_sentences"].to_numpy().astype(np.float32)
    relative = index / np.maximum(count - 1, 1)
    tokens = joined["n_tokens"].to_numpy().astype(np.float32)
    return np.column_stack([index, count, relative, tokens])


def _attention(joined: pl.DataFrame, attention: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The block's columns beside the key; `is_covered` is null where a table lacks the sentence."""
    rows = _left_join(joined.select(_KEY), attention["scores"])
    if "vertical" in attention:
        score = pl.col("vertical_score")
        long = attention["vertical"].with_columns(
            score.fill_null(score.mean().over("problem_id", "head")).fill_null(0.0),
            is_undefined=score.is_null().cast(pl.Float64),
        )
        heads = long.sort("head").pivot("head", index=_KEY, values="vertical_score")
        heads = heads.rename({name: f"head_{name}" for name in heads.columns[len(_KEY) :]})
        undefined = long.group_by(_KEY).agg(pl.col("is_undefined").max())
        rows = _left_join(_left_join(rows, heads), undefined)
    is_whole = ~pl.any_horizontal(pl.exclude(_KEY).is_null())
    return rows.with_columns(pl.when(is_whole).then(1).alias("is_covered"))


def _uncovered(joined: pl.DataFrame, column: str, name: str) -> list[str]:
    missing = joined.filter(pl.col(column).is_null())
    if missing.is_empty():
        return []
    counts = missing.group_by("problem_id").len("n").sort("problem_id")
    return [
        f"{row['n']} without {name} in problem {row['problem_id']}" for row in counts.to_dicts()
    ]


def _activation_faults(
    joined: pl.DataFrame, spans: pl.DataFrame, pooling: str, by_problem: ByProblem
) -> list[str]:
    size = pl.col("n_tokens").sum() if pooling == "tokens" else pl.len()
    unit = "tokens" if pooling == "tokens" else "spans"
    n_rows = dict(spans.group_by("problem_id").agg(size).iter_rows())
    faults, widths = [], {}
    for problem_id in joined["problem_id"].unique(maintain_order=True):
        rows = by_problem.get(problem_id)
        if rows is None:
            faults.append(f"no activations ({pooling}) for problem {problem_id}")
        elif rows.ndim != 2 or len(rows) != n_rows[problem_id]:
            faults.append(
                f"activations ({pooling}) of problem {problem_id} are {list(rows.shape)}, its "
                f"{unit} {n_rows[problem_id]}"
            )
        else:
            widths[problem_id] = rows.shape[1]
    if len(set(widths.values())) > 1:
        faults.append(f"d_model of {pooling} differs between problems: {widths}")
    return faults


def _stack(joined: pl.DataFrame, pooling: str, by_problem: ByProblem) -> NDArray[np.float32]:
    blocks = [
        np.asarray(by_problem[problem_id], dtype=np.float32)[group["sentence_idx"].to_numpy()]
        for (problem_id,), group in joined.group_by("problem_id", maintain_order=True)
    ]
    stacked = np.concatenate(blocks)
    _check_finite(stacked, np.arange(len(stacked)), joined, pooling)
    return stacked


def _token_sets(joined: pl.DataFrame, spans: pl.DataFrame, by_problem: ByProblem) -> TokenSets:
    counts = joined["n_tokens"].to_numpy()
    offsets = np.concatenate(([0], np.cumsum(counts)))
    lengths = {pid: group["n_tokens"] for (pid,), group in spans.group_by("problem_id")}
    blocks = []
    for (problem_id,), group in joined.group_by("problem_id", maintain_order=True):
        is_kept = np.isin(np.arange(len(lengths[problem_id])), group["sentence_idx"].to_numpy())
        blocks.append(by_problem[problem_id][np.repeat(is_kept, lengths[problem_id].to_numpy())])
    values = np.concatenate(blocks)
    _check_finite(values, np.repeat(np.arange(len(counts)), counts), joined, "tokens")
    return TokenSets(values, offsets)


def _check_finite(
    values: NDArray[Any], row: NDArray[np.int64], joined: pl.DataFrame, pooling: str
) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        shown = [joined.select(_KEY).row(int(each)) for each in np.unique(row[bad])[:_SHOWN]]
        raise NonFiniteError(
            f"{bad.size} activation rows ({pooling}) hold NaN or infinity",
            f"(problem_id, sentence_idx) {shown}",
            "extract them again; with storage float16, set activations.storage to float32",
        )
