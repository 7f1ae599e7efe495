"""Caches of one row, in which a prompt is read before it gets a slot."""

from __future__ import annotations

import functools

import torch

from halflap.models.cache import Cache
from halflap.models.model import HybridModel


class OneRow:
    """Makes them, with the meta tokens read; SSM states in `ssm_dtype`, float32 when not given."""

    def __init__(self, model: HybridModel, ssm_dtype: torch.dtype | None = None) -> None:
        self._model, self._ssm_dtype = model, ssm_dtype

    def __call__(self, tokens: int) -> Cache:
        """One with room for so many tokens."""
        model = self._model
        cache = Cache.create(model.config, 1, tokens, model.dtype, model.device, ssm_dtype=self._ssm_dtype)
        if self._meta_state is not None:
            cache.start_from(self._meta_state)
        return cache

    @functools.cached_property
    def _meta_state(self) -> Cache | None:
        """Asked for once: while an engine runs, the weights stay, as what it remembers of prompts needs, too."""
        model = self._model
        with torch.no_grad():  # it is asked for before the first step, too
            return None if model.meta_tokens is None else model.meta_state(model.dtype, model.device)
