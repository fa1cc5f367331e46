"""AdamW for a stack of token probes, and their first layer as scaled by each fold beside it.

What does not belong here: gradients (`token_backward`). Invariant: on CUDA the first layer, nearly
all of a stack, is stepped and scaled in one pass over the memory; the numbers are those of PyTorch
but for rounding.

Source:
    Loshchilov and Hutter 2019, algorithm 2; as in `torch.optim.AdamW`.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from taprobe_core.kernels import has_triton
from taprobe_core.solvers.token_backward import through_scaling
from taprobe_core.solvers.token_forward import FirstLayer, FoldScaling, Stack
from taprobe_core.solvers.token_options import TokenProbeOptions

BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam:
    """State of the optimiser of a stack.

    Attributes:
        gradient: of every parameter, to be written before each step.
    """

    def __init__(self, stack: Stack, options: TokenProbeOptions) -> None:
        self.options = options
        self.gradient, self._mean, self._square = (
            stack.like(torch.zeros_like(stack.flat)) for _ in range(3)
        )
        self._n_steps = torch.zeros((), device=stack.flat.device)

    def keep(self, models: torch.Tensor) -> None:
        """Drop all models but some, ascending [model] int64."""
        self.gradient, self._mean, self._square = (
            each.keep(models) for each in (self.gradient, self._mean, self._square)
        )

    def step(self, stack: Stack, scaling: FoldScaling, first: FirstLayer) -> None:
        """Move the stack along its gradient, and the first layer as scaled with it.

        Args:
            stack: the models.
            scaling: of each model's fold.
            first: of `stack`; overwritten.
        """
        if not (stack.flat.is_cuda and has_triton()):
            through_scaling(self.gradient, scaling)
            self._step(stack, 0)
            first.refresh(stack, scaling)
            return
        from taprobe_core.solvers.token_kernels import step_first_layer

        name = "token_weight_0"
        self._step(stack, stack.views[name].numel())
        step_first_layer(
            stack.views[name],
            (self._mean.views[name], self._square.views[name]),
            self.gradient.views[name],
            self.gradient.views["token_bias_0"],
            scaling,
            first,
            self._n_steps,
            learning_rate=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            betas=BETAS,
            eps=EPS,
        )

    def _step(self, stack: Stack, start: int) -> None:
        """Step every parameter from a place in the flat tensor on."""
        adamw(
            [stack.flat[start:]],
            [self.gradient.flat[start:]],
            [self._mean.flat[start:]],
            [self._square.flat[start:]],
            [],
            [self._n_steps],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            lr=self.options.learning_rate,
            weight_decay=self.options.weight_decay,
            maximize=False,
        )
