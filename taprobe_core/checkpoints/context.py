"""How long a text a model takes, told by its configuration before any weight is loaded."""

from __future__ import annotations

from taprobe_core.checkpoints.resolve import checkpoint_config
from taprobe_core.errors import ModelError, ModelMissingError, UnsafeModelError
from taprobe_core.study import Model


def context_length(model: Model) -> int | None:
    """Return the most tokens of a text that a model takes; None where its configuration is silent.

    A configuration that cannot be read sets no limit here: what is wrong with it is said when the
    model is loaded.

    Args:
        model: the model of the study.

    Raises:
        ModelMissingError: no `config.json` on this machine, and it is not to be had.
        UnsafeModelError: it names code.
    """
    try:
        config = checkpoint_config(model)
    except (ModelMissingError, UnsafeModelError):
        raise
    except ModelError:
        return None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None
