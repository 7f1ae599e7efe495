"""What kernels ask of an op's operands before they take them, whatever they are written in: dtypes, place and shapes.

An operand that is not there (None) fits everywhere. Legend as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halflap.models.config import Mamba2Config

WIDTHS = (2, 3, 4)
"""Of convolutions that the kernels are written for."""


@dataclass(frozen=True)
class Operands:
    """The floating dtypes that some kernels take, and the kind of device, None for any."""

    dtypes: tuple[torch.dtype, ...]
    device: str | None = None

    def fits(self, tensor: Tensor | None, *shape: int) -> bool:
        """In one of the dtypes, on the device, and of this shape."""
        return tensor is None or (tensor.dtype in self.dtypes and tensor.shape == shape and self._here(tensor))

    def counts(self, tensor: Tensor | None, *shape: int) -> bool:
        """The same for whole numbers."""
        return tensor is None or (not tensor.dtype.is_floating_point and tensor.shape == shape and self._here(tensor))

    def of_convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, runs: Tensor | None
    ) -> bool:
        """Whether `conv.conv_silu` can be had of these; weight (C, W)."""
        if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] not in WIDTHS or 0 in x.shape:
            return False
        (batch, time, channels), width = x.shape, weight.shape[1]
        return (
            self.fits(x, batch, time, channels)
            and self.fits(weight, channels, width)
            and self.fits(bias, channels)
            and self.fits(initial_state, batch, width - 1, channels)
            and self.counts(runs, batch, time)
        )

    def of_mamba2(
        self,
        c: Mamba2Config,
        projected: Tensor,
        parameters: Sequence[Tensor | None],
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        runs: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> bool:
        """Whether `mamba2.mamba2_mix`, or of rows without time `mamba2_step`, can be had of these.

        parameters: conv_weight, conv_bias, dt_bias, A_log, D, norm_weight.
        """
        conv_weight, conv_bias, *of_heads, norm_weight = parameters
        batch, *time = projected.shape[:-1]
        return (
            self.fits(projected, batch, *time, c.inner_size + c.conv_size + c.num_heads)
            and self.fits(conv_weight, c.conv_size, 1, c.conv_kernel)
            and self.fits(conv_bias, c.conv_size)
            and self.fits(norm_weight, c.inner_size)
            and all(self.fits(p, c.num_heads) for p in of_heads)
            and self.fits(conv_state, batch, c.conv_kernel - 1, c.conv_size)
            and self.fits(ssm_state, batch, c.num_heads, c.head_dim, c.state_size)
            and self.counts(runs, batch, *time)
            and self.counts(lengths, batch)
        )

    def of_selective(
        self,
        like_u: Sequence[Tensor | None],
        A: Tensor,
        of_states: Sequence[Tensor],
        of_channels: Sequence[Tensor | None],
        state: Tensor | None,
        runs: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> bool:
        """Whether `selective_scan.selective_scan`, or of rows without time `selective_step`, can be had of these.

        like_u: u, dt, gate; of_states: B, C; of_channels: D, dt_bias.
        """
        u = like_u[0]
        if u is None or A.dim() != 2 or 0 in (*u.shape, *A.shape):
            return False
        (batch, *time, channels), states = u.shape, A.shape[1]
        return (
            all(self.fits(x, batch, *time, channels) for x in like_u)
            and all(self.fits(x, batch, *time, states) for x in of_states)
            and all(self.fits(x, channels) for x in of_channels)
            and self.fits(A, channels, states)
            and self.fits(state, batch, channels, states)
            and self.counts(runs, batch, *time)
            and self.counts(lengths, batch)
        )

    def _here(self, tensor: Tensor) -> bool:
        return self.device is None or tensor.device.type == self.device
