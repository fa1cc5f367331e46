"""What besides meaning explains where attention goes: sinks, distance and length.

Figures to stand beside every vertical score, per head. What does not belong here: correcting a
score for them. The invariant: a share or a slope that cannot be known is NaN, never 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from taprobe_core.attention.scores import PROXIMITY, FloatArray

_N_COEFFICIENTS = 3
_NO_SPREAD = 1e-12


class SinkShare(NamedTuple):
    """Share of a head's attention that ends in a sink; float64 [..., head], from 0 to 1.

    Attributes:
        bos: on token 0, over all tokens of all sentences.
        first_sentence: on the first sentence, over the tokens of the sentences after it; NaN where
            there is none.
    """

    bos: FloatArray
    first_sentence: FloatArray


class DistanceLaw(NamedTuple):
    """log v_k = intercept + slope_distance log d_k + slope_length log n_k; float64 [head] each.

    Attributes:
        intercept: of the fit.
        slope_distance: exponent of the mean distance; negative where attention fades.
        slope_length: exponent of the sentence's length in tokens.
        r_squared: share of the variance of log v that both explain, from 0 to 1.
        n_sentences: int64 [head], scores in the fit; the others are NaN or not above 0.
    """

    intercept: FloatArray
    slope_distance: FloatArray
    slope_length: FloatArray
    r_squared: FloatArray
    n_sentences: npt.NDArray[np.int64]


def sink_share(mass: npt.ArrayLike, bos_mass: npt.ArrayLike, n_tokens: npt.ArrayLike) -> SinkShare:
    """Return the share of attention on BOS and on the first sentence.

    Each query token hands out one unit of attention, so shares are masses over query tokens.

    Args:
        mass: [..., head, sentence, sentence], as `sentence_mass` gives it.
        bos_mass: [..., head, sentence], from the same place.
        n_tokens: tokens of each sentence, [sentence].
    """
    lengths = np.asarray(n_tokens, dtype=np.float64)
    bos = np.asarray(bos_mass, dtype=np.float64).sum(axis=-1) / lengths.sum()
    on_first = np.asarray(mass, dtype=np.float64)[..., 1:, 0].sum(axis=-1)
    return SinkShare(bos, _ratio(on_first, np.full_like(on_first, lengths[1:].sum())))


def near_diagonal_share(mass: npt.ArrayLike, width: int = 1) -> FloatArray:
    """Return the share of the mass between sentences that stays within `width` of the diagonal.

    Args:
        mass: [..., head, sentence, sentence], as `sentence_mass` gives it.
        width: greatest distance in sentences; 1 is a sentence and its predecessor.

    Returns:
        float64 [..., head], from 0 to 1; NaN where a head has no mass between sentences.
    """
    values = np.asarray(mass, dtype=np.float64)
    sentence = np.arange(values.shape[-1])
    is_near = np.abs(sentence[:, None] - sentence) <= width
    return _ratio((values * is_near).sum(axis=(-2, -1)), values.sum(axis=(-2, -1)))


def distance_law(
    vertical: FloatArray, n_tokens: npt.ArrayLike, *, proximity: int = PROXIMITY
) -> DistanceLaw:
    """Regress the log of the vertical score on the logs of distance and length, head by head.

    Scores span orders of magnitude and attention fades roughly as a power of distance, so the fit
    is of logs, by least squares. The distance of sentence k is the mean of q - k over the rows that
    its score averages, in sentences: d_k = (proximity + S - 1 - k) / 2, which falls with position.

    Args:
        vertical: scores without depth control, [head, sentence], from `vertical_scores`.
        n_tokens: tokens of each sentence, [sentence].
        proximity: the one that the scores were made with.

    Returns:
        The fit of each head. A slope is NaN where its regressor does not vary, everything but the
        count is NaN below four scores, and R^2 is NaN where the scores are equal.
    """
    n_sentences = vertical.shape[-1]
    distance = (proximity + np.arange(n_sentences - 1, -1, -1)) / 2
    regressors = np.log(np.stack([distance, np.asarray(n_tokens, dtype=np.float64)]))
    used = vertical > 0
    n = used.sum(axis=-1)
    weight = used / np.maximum(n, 1)[:, None]
    log_score = np.log(np.where(used, vertical, 1.0))
    mean_score, mean_x = (log_score * weight).sum(axis=-1), weight @ regressors.T
    x = np.where(used[:, None, :], regressors - mean_x[..., None], 0.0)
    varies = (x**2).sum(axis=-1) > _NO_SPREAD
    x = np.where(varies[..., None], x, 0.0)
    y = np.where(used, log_score - mean_score[:, None], 0.0)
    slope = np.einsum("hpq,hqs,hs->hp", np.linalg.pinv(x @ x.mT, hermitian=True), x, y)
    residual = y - np.einsum("hp,hps->hs", slope, x)
    total = (y**2).sum(axis=-1)
    is_fitted = n > _N_COEFFICIENTS
    r_squared = 1 - _ratio((residual**2).sum(axis=-1), np.where(total > _NO_SPREAD, total, 0.0))
    intercept = mean_score - (slope * mean_x).sum(axis=-1)
    slope = np.where(varies & is_fitted[:, None], slope, np.nan)
    return DistanceLaw(
        np.where(is_fitted, intercept, np.nan),
        slope[:, 0],
        slope[:, 1],
        np.where(is_fitted, r_squared, np.nan),
        n,
    )


def _ratio(part: FloatArray, whole: FloatArray) -> FloatArray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
