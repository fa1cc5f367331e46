"""TF-IDF rows whose vocabulary and weights differ between folds, from one table of term counts.

Row i of fold f is `counts_i * idf_f / norm_fi`, with `norm_fi` the length of `counts_i * idf_f`:
scikit-learn's `TfidfTransformer` with its defaults, fitted on the fold's training rows. A weight of
0 says that the term is not in the fold's vocabulary. What does not belong here: cutting texts into
terms and counting them. Invariant: the counts are held once, sparse and on the CPU, whatever the
number of folds; products take and give arrays [column, ...].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from taprobe_core.errors import DataError

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
