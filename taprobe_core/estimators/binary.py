"""What every probe that tells two classes apart has in common: classes, log-odds, probabilities.

What does not belong here: fitting. Invariant: the second class is said where its log-odds are above
0, and both probabilities add up to 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets


class BinaryFace(ClassifierMixin):  # type: ignore[misc] # scikit-learn is untyped
    """Mixin of a classifier of two classes that has `_decide(X)`, the log-odds of the second.

    Attributes:
        classes_: [2], sorted.
    """

    classes_: NDArray[Any]

    if TYPE_CHECKING:

        def _decide(self, X: Any) -> NDArray[np.float64]: ...

    def _codes(self, labels: NDArray[Any]) -> NDArray[np.int64]:
        """Learn the classes; return 0 or 1 for each label.

        Raises:
            ValueError: no classes, or other than two of them.
        """
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"Only binary classification is supported. y has {len(self.classes_)} class(es), "
                "the classifier needs 2 classes"
            )
        return np.asarray(codes, dtype=np.int64)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return the log-odds of the second class, [row] float64."""
        return self._decide(X)

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return the probabilities of both classes, [row, 2] float64."""
        logit = self._decide(X)
        return np.stack([expit(-logit), expit(logit)], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the likelier class, [row]."""
        is_second = self._decide(X) > 0
        return np.take(self.classes_, is_second.astype(int))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
