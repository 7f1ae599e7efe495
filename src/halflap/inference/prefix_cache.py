"""What was read once is not read again: a radix tree of token ids with what passes over them left behind.

A node's edge is a run of tokens; the node holds the keys and values of whole attention at them, and may hold a
snapshot: convolution tails, SSM states and windows as they are after its last token, and that token's hidden state.
Recurrent states are of one place only, so a hybrid goes on at a node with a snapshot, which are made at the borders of
prefill passes, where prompts part, and at the ends of prompts and replies; pure whole attention goes on anywhere.
A hit copies into a cache of one row. At borders the passes that follow are those of reading everything anew, bit for
bit; elsewhere they are cut differently, and logits agree to rounding.

Over the byte budget the entry with the least priority goes: GreedyDual-Size-Frequency (Cherkasova 1998), uses x tokens
saved / bytes, plus an age that rises to the priority of what went last. Snapshots are as large as thousands of tokens'
keys and values, which is why their worth is counted by what they save (Marconi, Pan et al. 2025).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from halflap.models import slots
from halflap.models.cache import Cache, KeyValueState, State, parts

Span = tuple[Tensor, Tensor]  # keys and values (K, tokens, h) of one block
NEAR = 16  # tokens that a snapshot where prompts part must save


@dataclass
class Snapshot:
    """The states of a row after a node's last token: tensors in the order of `cache.parts`; its hidden state (D,)."""

    states: list[Tensor]
    hidden: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.states) + (0 if self.hidden is None else self.hidden.nbytes)


@dataclass(eq=False)
class Node:
    tokens: list[int]
    parent: Node | None
    depth: int  # tokens from the root to its end
    spans: list[Span]
    children: dict[int, Node] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    uses: int = 1
    priority: float = 0.0

    @property
    def span_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.spans)

    @property
    def nbytes(self) -> int:
        return self.span_bytes + (0 if self.snapshot is None else self.snapshot.nbytes)


@dataclass(frozen=True)
class Hit:
    """`cache` holds the first `depth` tokens; `hidden` (D,) is the last one's where it is known.

    branch: where the prompt parts from what others had in common with it, if reading should stop there for a snapshot.
    """

    depth: int
    cache: Cache
    hidden: Tensor | None
    branch: int | None


class PrefixCache:
    """`create(tokens)` makes a cache of one row with room for so many tokens, its meta tokens read."""

    def __init__(self, budget: int, create: Callable[[int], Cache]) -> None:
        self.budget, self._create = budget, create
        self._root = Node([], None, 0, [])
        self._age = 0.0
        self._queue: list[tuple[float, int, int, Node]] = []  # priority, uses, turn; stale entries are passed over
        self._turn = itertools.count()
        self._nodes = self._snapshots = 0
        self._pure = all(_is_whole(state) for state in parts(create(1)))
        self.bytes = self.asked = self.hits = self.hit_tokens = self.asked_tokens = self.evicted = 0

    def find(self, prompt: Sequence[int], room: int) -> Hit | None:
        """The longest usable beginning of a prompt, in a cache with room for `room` tokens."""
        path, matched = self._walk(prompt)
        self.asked += 1
        self.asked_tokens += len(prompt)
        depth, node = self._usable(path, matched, len(prompt))
        branch = matched if not self._pure and depth + NEAR <= matched < len(prompt) else None
        if not depth:
            return None if branch is None else Hit(0, self._create(room), None, branch)
        self.hits += 1
        self.hit_tokens += depth
        for used in path:
            if used.depth - len(used.tokens) < depth:
                used.uses += 1
                self._rate(used)
        cache = self._create(room)
        snapshot = None if node is None else node.snapshot
        self._restore(cache, path, depth, snapshot)
        return Hit(depth, cache, None if snapshot is None else snapshot.hidden, branch)

    def known(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt `find` would find; nothing is counted."""
        path, matched = self._walk(prompt)
        return self._usable(path, matched, len(prompt))[0]

    def store(self, tokens: Sequence[int], cache: Cache, row: int, hidden: Tensor | None = None) -> None:
        """Keep what row `row` of a cache, which has read exactly `tokens`, holds; hidden (D,) is the last token's."""
        node = self._insert(tokens, cache, row)
        if node is self._root:
            return
        if node.snapshot is None:
            states = [
                tensor[row].clone()
                for state in parts(cache)
                if not _is_whole(state)
                for tensor in slots.trimmed(state, len(tokens)).values()
            ]
            node.snapshot = Snapshot(states, None if hidden is None else hidden.clone())
            self._snapshots += 1
            self.bytes += node.snapshot.nbytes
        elif node.snapshot.hidden is None and hidden is not None:
            node.snapshot.hidden = hidden.clone()
            self.bytes += hidden.nbytes
        self._rate(node)
        self._shrink(node)

    def smallest(self, tokens: int) -> int:
        """Bytes of one entry of so many tokens: less than this can hold nothing."""
        return self._create(tokens).nbytes()

    def stats(self) -> dict[str, int | float]:
        return {
            "requests": self.asked,
            "hits": self.hits,
            "prompt_tokens": self.asked_tokens,
            "hit_tokens": self.hit_tokens,
            "hit_rate": self.hit_tokens / self.asked_tokens if self.asked_tokens else 0.0,
            "bytes": self.bytes,
            "budget": self.budget,
            "nodes": self._nodes,
            "snapshots": self._snapshots,
            "evicted": self.evicted,
        }

    # ---- the tree

    def _walk(self, tokens: Sequence[int]) -> tuple[list[Node], int]:
        """Nodes along the tokens, the last perhaps only in part, and how many tokens match."""
        path, node, place = [], self._root, 0
        while place < len(tokens) and (child := node.children.get(tokens[place])) is not None:
            shared = common(child.tokens, tokens, place)
            path.append(child)
            place += shared
            if shared < len(child.tokens):
                break
            node = child
        return path, place

    def _usable(self, path: list[Node], matched: int, length: int) -> tuple[int, Node | None]:
        """How many tokens can be gone on from, and the node whose snapshot that takes."""
        for node in reversed(path):
            whole = node.depth == length
            if node.depth > matched or node.snapshot is None or (whole and node.snapshot.hidden is None):
                continue
            if self._pure and not whole:
                break
            return node.depth, node
        return (min(matched, length - 1), None) if self._pure else (0, None)

    def _restore(self, cache: Cache, path: list[Node], depth: int, snapshot: Snapshot | None) -> None:
        whole = [state for state in parts(cache) if _is_whole(state)]
        for node in path:
            start = node.depth - len(node.tokens)
            count = min(node.depth, depth) - start
            if count <= 0:
                break
            for state, span in zip(whole, node.spans, strict=True):
                at = slice(cache.meta + start, cache.meta + start + count)
                for held, part in zip((state.keys, state.values), span, strict=True):  # type: ignore[union-attr]
                    held[0, :, at] = part[:, :count]
        if snapshot is not None:
            others = (state for state in parts(cache) if not _is_whole(state))
            targets = [tensor for state in others for tensor in slots.trimmed(state, depth).values()]
            for target, source in zip(targets, snapshot.states, strict=True):
                target[0] = source
        cache.lengths.fill_(depth)
        cache.used = depth

    def _insert(self, tokens: Sequence[int], cache: Cache, row: int) -> Node:
        """The node that ends with the tokens; what is missing on the way is made."""
        path, place = self._walk(tokens)
        node = path[-1] if path else self._root
        if node.depth > place:
            node = self._split(node, place - (node.depth - len(node.tokens)))
        if place == len(tokens):
            return node
        at = slice(cache.meta + place, cache.meta + len(tokens))
        spans = [
            (state.keys[row, :, at].clone(), state.values[row, :, at].clone())
            for state in parts(cache)
            if isinstance(state, KeyValueState) and state.window is None
        ]
        new = Node(list(tokens[place:]), node, len(tokens), spans)
        node.children[new.tokens[0]] = new
        self._nodes += 1
        self.bytes += new.nbytes
        return new

    def _split(self, node: Node, count: int) -> Node:
        """Put the first `count` tokens of a node into a node of their own, its new parent."""
        assert node.parent is not None
        cut = [tuple((t[:, :count].clone(), t[:, count:].clone()) for t in span) for span in node.spans]
        upper = Node(node.tokens[:count], node.parent, node.depth - len(node.tokens) + count, [])
        upper.spans = [(keys[0], values[0]) for keys, values in cut]
        upper.uses = node.uses
        node.spans = [(keys[1], values[1]) for keys, values in cut]
        node.tokens, node.parent = node.tokens[count:], upper
        upper.children[node.tokens[0]] = node
        assert upper.parent is not None
        upper.parent.children[upper.tokens[0]] = upper
        self._nodes += 1
        self._rate(upper)
        self._rate(node)
        return upper

    def _all_nodes(self) -> Iterator[Node]:
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    # ---- the budget

    def _rate(self, node: Node) -> None:
        """What is lost if it goes, by what goes with it."""
        above = node.parent
        while not self._pure and above is not None and above.parent is not None and above.snapshot is None:
            above = above.parent
        saved = node.depth - (0 if above is None else above.depth)
        node.priority = self._age + node.uses * saved / max(1, node.nbytes)
        self._enqueue(node)

    def _enqueue(self, node: Node) -> None:
        heapq.heappush(self._queue, self._queued(node))
        if len(self._queue) > 4 * self._nodes + 64:
            self._queue = [self._queued(node) for node in self._all_nodes()]
            heapq.heapify(self._queue)

    def _queued(self, node: Node) -> tuple[float, int, int, Node]:
        return node.priority, node.uses, next(self._turn), node

    def _shrink(self, newest: Node) -> None:
        """Back under the budget; the newest entry goes only when it alone is too much."""
        while self.bytes > self.budget and (worst := self._least(newest)) is not None:
            self._age = max(self._age, worst.priority)
            self._evict(worst)
        self._enqueue(newest)

    def _least(self, newest: Node) -> Node | None:
        """The entry of least priority, taken from the queue; the newest when there is no other."""
        while self._queue:
            priority, *_, node = heapq.heappop(self._queue)
            if node is not newest and priority == node.priority and self._holds_entry(node):
                return node
        return newest if self._holds_entry(newest) else None

    def _holds_entry(self, node: Node) -> bool:
        lives = node.parent is not None
        return lives and (not node.children or (node.snapshot is not None and not self._pure))

    def _evict(self, node: Node) -> None:
        """Drop a leaf, or an inner node's snapshot; of a hybrid, keys and values without a snapshot below go along."""
        self.evicted += 1
        self._drop_snapshot(node)
        while not node.children and node.snapshot is None and node.parent is not None:
            self.bytes -= node.span_bytes
            del node.parent.children[node.tokens[0]]
            self._nodes -= 1
            node.parent, node = None, node.parent
            if self._pure:
                break
        if node.parent is not None and self._holds_entry(node):
            self._enqueue(node)  # what became a leaf may be the next to go

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self.bytes -= node.snapshot.nbytes
            self._snapshots -= 1
            node.snapshot = None


def _is_whole(state: State) -> bool:
    """Keys and values of whole attention, which stay as they are while tokens follow."""
    return isinstance(state, KeyValueState) and state.window is None


def common(edge: Sequence[int], tokens: Sequence[int], place: int = 0) -> int:
    """How many tokens of an edge those from `place` on begin with."""
    limit = min(len(edge), len(tokens) - place)
    return next((i for i in range(limit) if edge[i] != tokens[place + i]), limit)
