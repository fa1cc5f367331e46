"""One feature matrix that every fold standardises for itself, without a copy per fold.

Fold f sees `(x - mean_f) / scale_f`, mean and population deviation of its training rows, as
scikit-learn's `StandardScaler` fitted there; a feature that is constant on them has scale 1. The
matrix is kept once, shifted and scaled by the statistics of all rows, `(x - mean) / scale`; a
fold's own standardisation is then `(shared - shift_f) * ratio_f`, a diagonal and a rank-one
correction around products with the shared matrix. All columns (models) of all folds go through one
matrix product.

Text may stand before the dense features: row i of fold f is `counts_i * idf_f / norm_fi`, with
`norm_fi` the length of `counts_i * idf_f`, which is scikit-learn's `TfidfTransformer` with its
defaults, fitted on the fold's training rows. A weight of 0 says that the term is not in the fold's
vocabulary.

What does not belong here: solving; cutting texts into terms and counting them. Invariants: feature
order is [terms; dense features]; arrays are [column, ...], the layout in which products with few
columns are fastest; float64 products read the features as given, not a rounded copy; term counts
are held once, sparse and on the CPU, whatever the number of folds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from taprobe_core.errors import DataError, NonFiniteError
from taprobe_core.solvers.columns import tensor_moments

_COMMON = 50
"""A term in more than one row of so many is common."""


@dataclass(frozen=True, eq=False)
class TextBlock:
    """Term counts and the weight of every term in every fold.

    Attributes:
        counts: [row, term] sparse (CSR), counts of each term in each row, at least 0.
        idf: [fold, term] float64, at least 0; 0 leaves the term out of the fold.
    """

    counts: sp.csr_matrix
    idf: NDArray[np.float64]

    def check(self, n_folds: int, n_rows: int) -> None:
        """Check shapes and that all numbers are finite and not negative.

        Raises:
            DataError: says what is wrong.
        """
        fits = self.counts.shape[0] == n_rows and self.idf.shape == (n_folds, self.counts.shape[1])
        if not fits:
            raise DataError(
                f"term counts are {self.counts.shape} and term weights {self.idf.shape}, "
                f"for {n_rows} rows and {n_folds} folds",
                "text block",
                "give one row of counts per sentence and one row of weights per fold",
            )
        for name, values in (("term counts", self.counts.data), ("term weights", self.idf)):
            if not (np.isfinite(values) & (values >= 0)).all():
                raise DataError(
                    f"{name} are negative or not finite",
                    "text block",
                    "count terms, and give weight 0 to terms outside a fold's vocabulary",
                )

    @property
    def n_terms(self) -> int:
        """Columns of the block: every term, in the fold's vocabulary or not."""
        return int(self.counts.shape[1])

    @cached_property
    def inverse_norm(self) -> NDArray[np.float64]:
        """Reciprocal row lengths, [fold, row]; 0 for a row without a term of the fold."""
        squares = self.counts.multiply(self.counts).tocsr().astype(np.float64)
        norm = np.sqrt((squares @ (self.idf**2).T).T)
        return _reciprocal(norm)

    @cached_property
    def _transposed(self) -> sp.csr_matrix:
        return self.counts.T.tocsr()

    def forward(self, fold: NDArray[np.int64], coef: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return TF-IDF rows times coefficients: [column, term] -> [column, row]."""
        product = self.counts @ np.ascontiguousarray((coef * self.idf[fold]).T)
        return np.asarray(product).T * self.inverse_norm[fold]

    def backward(self, fold: NDArray[np.int64], dual: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the transposed product: [column, row] -> [column, term]."""
        product = self._transposed @ np.ascontiguousarray((dual * self.inverse_norm[fold]).T)
        return np.asarray(product).T * self.idf[fold]

    def shared_gram(self) -> NDArray[np.float64]:
        """Return products of rows weighted by the folds' mean weights, [row, row] float64."""
        rows = self.counts.multiply(self.idf.mean(axis=0)).tocsr()
        norm = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
        inverse = _reciprocal(norm)
        rows = (sp.diags_array(inverse) @ rows).tocsc()
        # A term costs a sparse product the square of its rows: the few in many rows go to a dense
        # one, which leaves the sparse one next to nothing to do.
        is_common = np.diff(rows.indptr) * _COMMON > len(norm)
        common, rare = rows[:, is_common].toarray(), rows[:, ~is_common].tocsr()
        gram = common @ common.T
        rest = (rare @ rare.T).tocoo()
        gram[rest.row, rest.col] += rest.data
        return np.asarray(gram)

    def rows(self, fold: int) -> NDArray[np.float64]:
        """Return one fold's TF-IDF rows, [row, term] float64, dense: for small tables."""
        dense = self.counts.toarray() * self.idf[fold]
        return np.asarray(dense * self.inverse_norm[fold][:, None])

    @cached_property
    def shared(self) -> TextBlock:
        """One fold, which weighs every term by the mean of the folds' weights."""
        return TextBlock(self.counts, self.idf.mean(axis=0, keepdims=True))


def _reciprocal(norm: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse: NDArray[np.float64] = np.zeros_like(norm)
    np.divide(1.0, norm, out=inverse, where=norm > 0)
    return inverse


Scaling = Literal["fold", "shared", "none"]

_CACHED_FLOAT64_VALUES = 1 << 22
_CHUNK_VALUES = 1 << 21
_GRAM_ROWS = 256
_MANY = 32
"""Columns."""


class FoldMatrix:
    """Features of all rows, standardised by every fold on its own training rows.

    Args:
        train: [fold, row] bool, training rows.
        dense: [row, feature] float32 or float64, or None.
        text: TF-IDF block, or None; at least one of both.
        visible: [fold, feature] bool of the dense block; a feature that a fold does not see has a
            coefficient of 0 there, as if it were not in the matrix. None: all see all. So columns
            with and without a few features share the products of the others.
        scaling: "fold", each fold standardises for itself; "shared", one mean and scale of all
            rows, a different estimator (it has seen the held-out rows' features); "none".
        device: where the dense block and its products live; a text block stays on the CPU.

    Attributes:
        train: as given.
        mean: [fold, feature] float64 of the dense block, 0 with scaling "none".
        scale: [fold, feature] float64 of the dense block, positive.

    Raises:
        DataError: shapes disagree, there are no features, or a fold has no training row.
        NonFiniteError: a feature is NaN or infinite.
    """

    def __init__(
        self,
        train: NDArray[np.bool_],
        dense: NDArray[np.float32] | NDArray[np.float64] | None = None,
        text: TextBlock | None = None,
        *,
        visible: NDArray[np.bool_] | None = None,
        scaling: Scaling = "fold",
        device: str | torch.device = "cpu",
    ) -> None:
        self.train = np.asarray(train, dtype=bool)
        self.text = text
        self.device = torch.device(device)
        self.scaling: Scaling = scaling
        self._visible = visible
        self._check(dense)
        values = np.empty((self.n_rows, 0)) if dense is None else dense
        self._raw = torch.as_tensor(np.ascontiguousarray(values)).to(self.device)
        self._standardise()
        self._shared64: Tensor | None = None
        self._shared32: Tensor | None = None

    def _check(self, dense: NDArray[np.float32] | NDArray[np.float64] | None) -> None:
        if dense is None and self.text is None:
            raise DataError(
                "no features", "fold matrix", "give a dense block, a text block or both"
            )
        if self.train.ndim != 2 or not self.train.any(axis=1).all():
            raise DataError("a fold has no training row", "fold matrix", "leave the fold out")
        if self.text is not None:
            self.text.check(self.n_folds, self.n_rows)
        if dense is None:
            return
        if self._visible is not None and self._visible.shape != (self.n_folds, dense.shape[1]):
            raise DataError(
                f"visible features are {self._visible.shape}",
                "fold matrix",
                f"give {self.n_folds} folds x {dense.shape[1]} features",
            )
        if dense.ndim != 2 or len(dense) != self.n_rows:
            raise DataError(
                f"dense features are {dense.shape} for {self.n_rows} rows",
                "fold matrix",
                "give one row of features per sentence",
            )
        bad = np.flatnonzero(~np.isfinite(dense).all(axis=1))
        if bad.size:
            raise NonFiniteError(
                f"{bad.size} rows of features hold NaN or infinity",
                f"fold matrix, row {bad[0]} first",
                "extract these activations again in float32",
            )

    @property
    def n_rows(self) -> int:
        """Rows, training or not."""
        return int(self.train.shape[1])

    @property
    def n_folds(self) -> int:
        """Folds."""
        return int(self.train.shape[0])

    @property
    def n_terms(self) -> int:
        """Features of the text block."""
        return 0 if self.text is None else self.text.n_terms

    @property
    def n_dense(self) -> int:
        """Features of the dense block."""
        return int(self._raw.shape[1])

    @property
    def n_features(self) -> int:
        """Terms and dense features together."""
        return self.n_terms + self.n_dense

    # ---- statistics -----------------------------------------------------------------------------

    def _standardise(self) -> None:
        n, d, n_folds = self.n_rows, self.n_dense, self.n_folds
        self._mean = torch.zeros(d, dtype=torch.float64, device=self.device)
        self._scale = torch.ones_like(self._mean)
        mean, scale = self._mean.expand(n_folds, d), self._scale.expand(n_folds, d)
        if self.scaling != "none" and d:
            # The last of these folds has all rows.
            masks = torch.as_tensor(np.vstack([self.train, np.ones((1, n), dtype=bool)]))
            means, scales = tensor_moments(self._raw, masks.to(self.device))
            self._mean, self._scale = means[-1], scales[-1]
            is_own = self.scaling == "fold"
            mean = means[:-1] if is_own else self._mean.expand(n_folds, d)
            scale = scales[:-1] if is_own else self._scale.expand(n_folds, d)
        self._shift = (mean - self._mean) / self._scale
        self._ratio = self._scale / scale
        if self._visible is not None:
            self._ratio = self._ratio * torch.as_tensor(self._visible, device=self.device)
        self.mean: NDArray[np.float64] = mean.cpu().numpy().copy()
        self.scale: NDArray[np.float64] = scale.cpu().numpy().copy()

    # ---- the shared matrix ----------------------------------------------------------------------

    def _chunks64(self) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, _CHUNK_VALUES // max(self.n_dense, 1))
        for start in range(0, self.n_rows, step):
            rows = slice(start, min(start + step, self.n_rows))
            yield rows, (self._raw[rows].double() - self._mean) / self._scale

    def _float64(self) -> Iterator[tuple[slice, Tensor]]:
        """Give the shared matrix in float64: kept when small or on an accelerator's memory."""
        if self.n_rows * self.n_dense > _CACHED_FLOAT64_VALUES and self.device.type == "cpu":
            yield from self._chunks64()
            return
        if self._shared64 is None:
            self._shared64 = torch.cat([chunk for _, chunk in self._chunks64()])
        yield slice(0, self.n_rows), self._shared64

    def _float32(self) -> Iterator[tuple[slice, Tensor]]:
        if self._shared32 is None:
            shape = (self.n_rows, self.n_dense)
            self._shared32 = torch.empty(shape, dtype=torch.float32, device=self.device)
            for rows, chunk in self._chunks64():
                self._shared32[rows] = chunk
        yield slice(0, self.n_rows), self._shared32

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        return self._float64() if dtype == torch.float64 else self._float32()

    # ---- products -------------------------------------------------------------------------------

    def forward(self, fold: NDArray[np.int64], coef: Tensor) -> Tensor:
        """Return standardised features times coefficients, without intercept.

        Args:
            fold: [column] fold of each column.
            coef: [column, feature] in the column's fold's standardised space; its type, float32 or
                float64, is the type of the products.

        Returns:
            [column, row], every row, in the type of `coef`.
        """
        out = torch.empty(len(fold), self.n_rows, dtype=coef.dtype, device=self.device)
        at = torch.as_tensor(fold, device=self.device)
        scaled = coef[:, self.n_terms :] * self._ratio[at].to(coef.dtype)
        for rows, part in self._parts(coef.dtype):
            if len(fold) >= _MANY and self.device.type == "cpu":
                # Half as fast again as the product the other way round.
                out[:, rows] = (part @ scaled.T).T
            else:
                out[:, rows] = scaled @ part.T
        out -= (scaled * self._shift[at].to(coef.dtype)).sum(1, keepdim=True)
        if self.text is not None:
            terms = coef[:, : self.n_terms].cpu().numpy()
            out += torch.as_tensor(self.text.forward(fold, terms)).to(out)
        return out

    def backward(self, fold: NDArray[np.int64], dual: Tensor) -> Tensor:
        """Return transposed standardised features times row weights.

        Args:
            fold: [column] fold of each column.
            dual: [column, row] float32 or float64.

        Returns:
            [column, feature], in the type of `dual`.
        """
        at = torch.as_tensor(fold, device=self.device)
        out = torch.zeros(len(fold), self.n_dense, dtype=dual.dtype, device=self.device)
        for rows, part in self._parts(dual.dtype):
            out.addmm_(dual[:, rows], part)
        out.sub_(dual.sum(1, keepdim=True) * self._shift[at].to(dual.dtype))
        out *= self._ratio[at].to(dual.dtype)
        if self.text is None:
            return out
        terms = torch.as_tensor(self.text.backward(fold, dual.cpu().numpy())).to(out)
        return torch.cat([terms, out], dim=1)

    def kernel(self, fold: NDArray[np.int64], dual: Tensor) -> Tensor:
        """Return `X_f X_f' dual`, [column, row] -> [column, row], in the type of `dual`."""
        return self.forward(fold, self.backward(fold, dual))

    def shared_gram(self, dtype: torch.dtype) -> Tensor:
        """Return row products under the scaling of all rows, [row, row]: one for all folds."""
        gram = torch.zeros(self.n_rows, self.n_rows, dtype=dtype, device=self.device)
        if self.n_dense:
            shared = self.shared_dense(dtype)
            if self.device.type == "cpu":
                # NumPy sees that both factors are one matrix and computes one triangle (SYRK).
                values = shared.numpy()
                gram = torch.from_numpy(values @ values.T)
            else:
                gram = shared @ shared.T
        if self.text is not None:
            gram += torch.as_tensor(self.text.shared_gram()).to(gram)
        return gram

    def fold_gram(self, fold: int, rows: Tensor) -> Tensor:
        """Return products of some of a fold's rows with one another, [row, row] float64."""
        gram = torch.empty(len(rows), len(rows), dtype=torch.float64, device=self.device)
        for start in range(0, len(rows), _GRAM_ROWS):
            part = rows[start : start + _GRAM_ROWS]
            unit = torch.zeros(len(part), self.n_rows, dtype=torch.float64, device=self.device)
            unit[torch.arange(len(part), device=self.device), part] = 1.0
            products = self.kernel(np.full(len(part), fold), unit)
            gram[start : start + len(part)] = products[:, rows]
        return gram

    def shared_dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dense block under the scaling of all rows, [row, feature]."""
        parts = [part for _, part in self._parts(dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def seen(self, fold: NDArray[np.int64]) -> Tensor | None:
        """Return which dense features each column sees, [column, feature]; None: all see all."""
        if self._visible is None:
            return None
        return torch.as_tensor(self._visible[fold], device=self.device)

    @property
    def visible_sets(self) -> NDArray[np.int64]:
        """Which set of dense features each fold sees, [fold], numbered from 0."""
        if self._visible is None:
            return np.zeros(self.n_folds, dtype=np.int64)
        return np.unique(self._visible, axis=0, return_inverse=True)[1].reshape(-1)

    def shared_lengths(self) -> Tensor:
        """Return squared row lengths under the scaling of all rows, [row] float64."""
        lengths = torch.zeros(self.n_rows, dtype=torch.float64, device=self.device)
        for rows, part in self._float32():
            lengths[rows] = part.square().sum(1, dtype=torch.float64)
        return lengths if self.text is None else lengths + 1.0

    def rows(self, fold: int) -> Tensor:
        """Return one fold's standardised features, [row, feature] float64: for small matrices."""
        dense = torch.cat([part for _, part in self._float64()])
        dense = (dense - self._shift[fold]) * self._ratio[fold]
        if self.text is None:
            return dense
        return torch.cat([torch.as_tensor(self.text.rows(fold)).to(dense), dense], dim=1)
