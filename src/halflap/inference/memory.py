"""Whether decode state fits: counted from the config, against a number of bytes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence

import torch

from halflap.models.config import ModelConfig
from halflap.models.count import cache_bytes, cache_parts


class Budget:
    """`configs` are the models that keep state for every row, behind the first a draft model; bytes None is no limit.

    ssm_dtype: of the first model's SSM states, float32 or wider where it is None, as those of a draft model are.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        dtype: torch.dtype,
        bytes_: int | None,
        ssm_dtype: torch.dtype | None = None,
    ) -> None:
        self.configs, self.bytes = tuple(configs), bytes_
        self._bits = 8 * dtype.itemsize
        wide = torch.promote_types(dtype, torch.float32)
        self._ssm_bits = [8 * (ssm_dtype or wide).itemsize, *(8 * wide.itemsize for _ in self.configs[1:])]

    def row(self, tokens: int) -> int:
        """Bytes of one sequence of so many tokens."""
        return sum(self._each(tokens))

    def _each(self, tokens: int) -> list[int]:
        """Of each model."""
        return [
            cache_bytes(config, tokens, kv_bits=self._bits, ssm_bits=ssm_bits, conv_bits=self._bits)
            for config, ssm_bits in zip(self.configs, self._ssm_bits, strict=True)
        ]

    def shares(self, bytes_: int, tokens: int) -> list[int]:
        """Bytes divided among the models as a sequence of so many tokens is."""
        each = self._each(tokens)
        return [bytes_ * own // (sum(each) or 1) for own in each]

    def longest(self, tokens: int) -> int:
        """The longest sequence that fits, of at most so many tokens; 0 when none does."""
        return bisect(range(1, tokens + 1), False, key=lambda length: not self.fits([(1, length)]))

    def kinds(self, lengths: Sequence[int]) -> dict[str, int]:
        """Bytes that sequences of these lengths need of the model itself, by what they hold."""
        total: dict[str, float] = {}
        for length in lengths:
            bits = {"kv_bits": self._bits, "ssm_bits": self._ssm_bits[0], "conv_bits": self._bits}
            parts = cache_parts(self.configs[0], length, **bits)
            for name, value in parts.items():
                total[name] = total.get(name, 0) + value
        return {name: round(value) for name, value in total.items()}

    def fits(self, sizes: Iterable[tuple[int, int]], beside: int = 0) -> bool:
        """Rows with room for so many tokens each, for each of `sizes`, and `beside` bytes besides."""
        return self.bytes is None or sum(rows * self.row(tokens) for rows, tokens in sizes) + beside <= self.bytes
