"""The cost table: measured times of stacks of equal blocks and of a whole model on one device, as a JSON file.

Each row is a `Stack`, timed once a round; a condition (phase, context, batch) whose rows all have their times gets a
cost model. The file also says what it was measured on, and a table is only used where all of that is the same. It is
written after every timing, so that an interrupted measurement goes on where it stopped. Pure data: no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from halflap.compress.cost_model import Condition, CostModel, amounts, fit, kind_of
from halflap.errors import HalflapError
from halflap.files import write_json
from halflap.models.config import BlockConfig, ModelConfig, block_from_json, block_to_json
from halflap.models.sharing import with_source

FORMAT = "halflap-costs-1"
MEASURE = "measure one with `halflap bench MODEL --blocks --prompt {context} --batch {batch} --out DIR`"
SAME = {"device": "device", "name": "processor", "threads": "number of threads", "dtype": "dtype", "kernels": "kernels"}
"""What must be the same where a table is used, and what people call it; the version of torch is only said."""


@dataclass(frozen=True)
class Stack:
    """A model of equal blocks to be timed, or (`block` None) the whole model itself.

    Its copies have weights of their own, so that what a block reads has left the caches when it is read again. In front
    of blocks that read another's keys and values stands one that has them.
    """

    hidden_size: int
    vocab_size: int
    block: BlockConfig | None
    copies: int

    def config(self, model: ModelConfig) -> ModelConfig:
        if self.block is None:
            return model
        source = with_source(self.block, None)
        blocks = (self.block,) * self.copies if source == self.block else (source, *(self.block,) * self.copies)
        return dataclasses.replace(model, hidden_size=self.hidden_size, vocab_size=self.vocab_size, blocks=blocks)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"block": None if self.block is None else block_to_json(self.block)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Stack:
        block = None if data["block"] is None else block_from_json(data["block"])
        return Stack(data["hidden_size"], data["vocab_size"], block, data["copies"])


Rows = Mapping[Stack, tuple[float, ...]]
"""Seconds of each stack, one a round."""


@dataclass(frozen=True)
class CostTable:
    """`model` is the one whose blocks were timed; `machine` has the fields of SAME and "torch"."""

    machine: Mapping[str, Any]
    model: ModelConfig
    rows: Mapping[Condition, Rows]
    models: Mapping[Condition, CostModel] = dataclasses.field(default_factory=dict)

    def fitted(self) -> CostTable:
        """With the cost model of every condition; all rows must have their times."""
        return dataclasses.replace(self, models={c: _fit(self.model, c, rows) for c, rows in self.rows.items()})

    def seconds(self, config: ModelConfig, condition: Condition) -> float:
        """The predicted time of a pass; of the measured model, what it took."""
        return self.models[condition].seconds(config, condition)

    def at_pace(self, condition: Condition, pace: float) -> CostTable:
        """With every prediction under a condition times a factor."""
        costs = self.models[condition]
        scaled = dataclasses.replace(costs, scale=pace * costs.scale)
        return dataclasses.replace(self, models={**self.models, condition: scaled})

    def unknown(self, condition: Condition, blocks: Iterable[BlockConfig]) -> list[str]:
        """Kinds of these blocks that it tells no times of."""
        return sorted({kind_of(block) for block in blocks} - set(self.models[condition].coefficients))

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def check(self, name: str, machine: Mapping[str, Any], condition: Condition, config: ModelConfig) -> None:
        """Raise HalflapError, by name of what differs, unless it tells times of `config` here under `condition`."""
        again = MEASURE.format(context=condition.context, batch=condition.batch)

        def refuse(what: str, mend: str) -> NoReturn:
            raise HalflapError(f"the cost table {name!r} {what}; {mend}, or leave --costs out")

        if not self.models:
            refuse("is not finished", "run the same `halflap bench` again, which goes on with it")
        for field, word in SAME.items():
            if (there := self.machine.get(field)) != machine[field]:
                refuse(f"was measured with {word} {there}, and here it is {machine[field]}", again)
        if condition not in self.models:
            covered = "; ".join(map(str, sorted(self.models)))
            refuse(f"covers {covered}, and the budget is of {condition}", f"give what it covers, or {again}")
        if absent := self.unknown(condition, config.blocks):
            refuse(f"has no times of {absent[0]} blocks, and this model has some", again)
        for field in ("hidden_size", "vocab_size"):
            if (here := getattr(config, field)) > (there := getattr(self.model, field)):
                refuse(f"was measured on a model of {field} {there}, and this one has {here}", again)

    def to_json(self) -> dict[str, Any]:
        conditions = []
        for condition, rows in self.rows.items():
            costs = self.models.get(condition)
            timed = [stack.to_json() | {"seconds": list(seconds)} for stack, seconds in rows.items()]
            conditions.append({**vars(condition), "fit": None if costs is None else vars(costs), "rows": timed})
        machine, model = dict(self.machine), self.model.to_json()
        return {"format": FORMAT, "machine": machine, "model": model, "conditions": conditions}

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> CostTable:
        """Raises HalflapError when the file is no cost table."""
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            if data["format"] != FORMAT:
                raise HalflapError(
                    f"{str(path)!r} is of format {data['format']!r}, and {FORMAT!r} is read here; measure it again"
                )
            rows: dict[Condition, Rows] = {}
            models = {}
            for part in data["conditions"]:
                condition = Condition(part["phase"], part["context"], part["batch"])
                rows[condition] = {Stack.from_json(row): tuple(row["seconds"]) for row in part["rows"]}
                if part["fit"] is not None:
                    models[condition] = CostModel(**part["fit"])
            return CostTable(dict(data["machine"]), ModelConfig.from_json(data["model"]), rows, models)
        except FileNotFoundError:
            raise HalflapError(
                f"cost table {str(path)!r} does not exist; make it with `halflap bench --blocks`"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, HalflapError):
                raise
            raise HalflapError(f"{str(path)!r} is not a cost table ({error!r}); give a costs.json") from error


def _fit(model: ModelConfig, condition: Condition, rows: Rows) -> CostModel:
    """From the stacks; scaled so that the whole model's time is the measured one."""
    taken = {stack: statistics.median(seconds) for stack, seconds in rows.items()}
    stacks = [(amounts(s.config(model), condition), seconds) for s, seconds in taken.items() if s.block is not None]
    found = fit(stacks)
    whole = next(seconds for stack, seconds in taken.items() if stack.block is None)
    return dataclasses.replace(found, scale=whole / found.seconds(model, condition))
