"""What attention, SSMs, MLPs and meta tokens do, layer by layer (the analyses of Hymba, arXiv 2411.13676).

Where attention goes: the mean share of each query's attention on the meta tokens, on the document's first token, on
the query's own and on the others; and its entropy. What a branch is worth: the loss added when the attention or the
SSM of a block, or its MLP, gives zero. Legend: B batch, H heads, T queries, S keys, M meta tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halflap.errors import HalflapError
from halflap.evaluate.documents import Document
from halflap.models.config import HybridConfig, ModelConfig
from halflap.models.model import HybridModel
from halflap.ops import select
from halflap.progress import Progress

TARGETS = ("meta", "first", "self", "others")


@dataclass
class Attention:
    """Sums over queries of one block: mass on each of TARGETS (4,), on each meta token (M,), entropy, and how many."""

    mass: Tensor
    by_meta_token: Tensor
    entropy: float = 0.0
    queries: int = 0

    def add(self, probabilities: Tensor, meta: int) -> None:
        """probabilities (B, H, T, S) of a whole pass, T == S: queries and keys at the same positions."""
        p = probabilities[:, :, meta:].double()
        total = p.sum(-1)
        on_meta = p[..., :meta]
        first, own = p[..., meta], p.diagonal(meta, -2, -1)
        own = torch.where(torch.arange(own.shape[-1]) == 0, 0.0, own)  # the first token's own counts as first
        parts = [on_meta.sum(-1), first, own]
        self.mass += torch.stack([*(part.sum() for part in parts), (total - sum(parts)).sum()])
        self.by_meta_token += on_meta.sum((0, 1, 2))
        self.entropy += float(torch.special.entr(p).sum())
        self.queries += total.numel()


@dataclass
class Analysis:
    """One row a block, and over all blocks the attention on each meta token by domain of text; tokens read of each."""

    layers: list[dict[str, Any]]
    tokens_by_domain: dict[str, int]
    domains: dict[str, list[float]] = field(default_factory=dict)
    similarity: list[list[float]] = field(default_factory=list)


def analyze(
    model: HybridModel, texts: Mapping[str, Sequence[Document]], *, context: int, tokens: int, removal_tokens: int
) -> Analysis:
    """Analyse on the first `tokens` tokens of each domain of text, in rows of `context`; removals on fewer.

    texts: documents by name of the domain. Raises HalflapError when a domain has no row of two tokens.
    """
    rows = {name: list(_rows(documents, context, tokens)) for name, documents in texts.items()}
    if empty := [name for name, domain in rows.items() if not domain]:
        raise HalflapError(
            f"the text of {empty[0]!r} has no row of two tokens, which is the least that can be analysed; give longer "
            "text, or --tokens and --context of at least 2"
        )
    attention = _blocks_with_attention(model.config)
    total = {index: _empty(model.config) for index in attention}
    domains: dict[str, list[float]] = {}
    with Progress("attention", sum(map(len, rows.values())), unit="rows") as progress:
        for name, domain in rows.items():
            found = {index: _empty(model.config) for index in attention}
            for row in domain:
                for index, probabilities in zip(attention, _probabilities(model, row), strict=True):
                    for into in (found[index], total[index]):
                        into.add(probabilities, model.config.num_meta_tokens)
                progress.advance()
            if model.config.num_meta_tokens and attention:
                domains[name] = _mean_over_blocks(found.values())
    removed = _removals(model, _share(rows, removal_tokens))
    layers = [_layer(model.config, index, total.get(index), removed[index]) for index in range(len(model.blocks))]
    read = {name: sum(row.shape[1] for row in domain) for name, domain in rows.items()}
    return Analysis(layers, read, domains, _cosines(list(domains.values())))


def _blocks_with_attention(config: ModelConfig) -> list[int]:
    return [index for index, block in enumerate(config.blocks) if block.attention is not None]


def _empty(config: ModelConfig) -> Attention:
    mass, by_meta_token = (torch.zeros(n, dtype=torch.float64) for n in (len(TARGETS), config.num_meta_tokens))
    return Attention(mass, by_meta_token)


def _rows(documents: Sequence[Document], context: int, tokens: int) -> Iterator[Tensor]:
    """Token rows (1, at most context), whole documents cut into pieces, until `tokens` are together."""
    left = tokens
    for document in documents:
        for start in range(0, len(document.tokens), context):
            piece = torch.from_numpy(document.tokens[start : start + min(context, left)])[None]
            if piece.shape[1] > 1:
                yield piece
            left -= piece.shape[1]
            if left <= 1:
                return


def shared_rows(texts: Mapping[str, Sequence[Document]], context: int, tokens: int, wanted: int) -> list[Tensor]:
    """The rows on which removals are measured: about `wanted` tokens, of all domains in turn."""
    return _share({name: list(_rows(documents, context, tokens)) for name, documents in texts.items()}, wanted)


def _share(rows: dict[str, list[Tensor]], tokens: int) -> list[Tensor]:
    """Rows of all domains in turn, about `tokens` tokens of them, at least one."""
    chosen: list[Tensor] = []
    for place in range(max(map(len, rows.values()), default=0)):
        for domain in rows.values():
            if place < len(domain) and (not chosen or sum(row.shape[1] for row in chosen) < tokens):
                chosen.append(domain[place])
    return chosen


# ---- where attention goes


@torch.inference_mode()
def _probabilities(model: HybridModel, row: Tensor) -> list[Tensor]:
    """The attention (1, H, S, S) of each block that has one, meta tokens among the S positions."""
    seen: list[Tensor] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Callable[[], Tensor | None], **_: Any) -> Tensor:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        allowed = mask()
        if allowed is None:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        seen.append(probabilities.cpu())
        return (probabilities @ value.float()).to(value.dtype)

    with _attention_is(watched):
        model.hidden_states(row.to(model.device))
    return seen


@contextmanager
def _attention_is(function: Callable[..., Tensor]) -> Iterator[None]:
    """All blocks attend by `function` meanwhile."""
    op = select.attention
    before = op.plain, op.native
    op.plain, op.native = function, lambda *_, **__: NotImplemented
    try:
        yield
    finally:
        op.plain, op.native = before


def _mean_over_blocks(found: Any) -> list[float]:
    shares = [attention.by_meta_token / attention.queries for attention in found]
    return torch.stack(shares).mean(0).tolist()


def _cosines(vectors: Sequence[Sequence[float]]) -> list[list[float]]:
    """How alike the domains use the meta tokens."""
    if not vectors:
        return []
    unit = nn.functional.normalize(torch.tensor(vectors, dtype=torch.float64), dim=-1)
    return (unit @ unit.T).tolist()


# ---- what a branch is worth


def branches(model: HybridModel, index: int) -> dict[str, nn.Module]:
    """The parts of a block that can be left out: the module whose output is then zero."""
    block, mixer = model.config.blocks[index], model.blocks[index].mixer  # type: ignore[union-attr]
    if isinstance(block, HybridConfig):
        return {"attention": mixer.attention_norm, "ssm": mixer.ssm_norm}  # type: ignore[dict-item]
    kind = "attention" if block.attention is not None else "ssm" if block.ssm is not None else block.kind
    return {kind: mixer}  # type: ignore[dict-item]


def _removals(model: HybridModel, rows: Sequence[Tensor]) -> list[dict[str, float]]:
    """For each block the loss added, nats a token, when a branch of it gives zero."""
    whole = _loss(model, rows)
    found: list[dict[str, float]] = []
    with Progress("branches left out", len(model.blocks), unit="blocks") as progress:
        for index in range(len(model.blocks)):
            added = {}
            for name, module in branches(model, index).items():
                hook = module.register_forward_hook(_nothing)
                try:
                    added[name] = _loss(model, rows) - whole
                finally:
                    hook.remove()
            found.append(added)
            progress.advance()
    return found


def _nothing(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: the module gives zero."""
    return torch.zeros_like(output)


@torch.inference_mode()
def _loss(model: HybridModel, rows: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for row in rows:
        row = row.to(model.device)
        logits = model(row[:, :-1])
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
        count += row.shape[1] - 1
    return total / count


def _layer(config: ModelConfig, index: int, found: Attention | None, removed: dict[str, float]) -> dict[str, Any]:
    block = config.blocks[index]
    row: dict[str, Any] = {"block": index, "kind": block.kind, "loss_added_without": removed}
    if found is not None and block.attention is not None:
        shares = dict(zip(TARGETS, (found.mass / found.queries).tolist(), strict=True))
        row |= {"window": block.attention.window, "attention": shares, "entropy": found.entropy / found.queries}
    return row
