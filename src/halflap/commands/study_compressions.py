"""What a study's YAML says of arms that are cut from a teacher: settings of `compress`, and how arms hang together.

    half:     {params: 50%}                                  any setting of `compress`, over those of `base`
    blind:    {control: group_blind, of: half}               a control trained beside that arm (arms.py says which)
    scratch:  {control: scratch, of: half, tokens: 4M}       that arm's shape from random weights, on tokens of its own
    channels: {match: {latency: half}, space: {...}}         budgets that are what that arm's student has

An arm that hangs on another one is trained after it, seed by seed. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halflap.binding import bind
from halflap.commands.config_compress import CompressRecipe
from halflap.compress.axes import Sizes
from halflap.compress.costs import BUDGETS
from halflap.errors import HalflapError, RecipeError
from halflap.recipe import normalise, unknown_name

STUDYS_OWN = (
    *("model", "data", "data.field", "data.weights", "data.packing", "data.held_out", "eval_data", "eval_context"),
    *("importance", "costs", "controls", "elastic", "top_k_in"),
    *("out", "seed", "device", "dtype", "json", "quiet", "overwrite"),
)
"""Settings of `compress` that arms share, that follow from how arms belong together, or that make several students."""
JUDGED_ON = "eval_tokens"
CONTROLS = ("scratch", "group_blind", "random")
MATCHED = ("params", "latency")


@dataclass(frozen=True)
class Compression:
    """An arm cut from a teacher, or a control of one (`of`); `match` names for budgets the arm that sets them.

    `recipe` is that of `compress` without what all arms share; of the control `scratch` its tokens and fit count.
    """

    recipe: CompressRecipe
    control: str | None = None
    of: str | None = None
    match: Mapping[str, str] = field(default_factory=dict)

    @property
    def leans_on(self) -> tuple[str, ...]:
        """Arms whose students must be there first."""
        return (*([self.of] if self.of else []), *self.match.values())

    @property
    def needs_times(self) -> bool:
        budgets = self.recipe.budgets
        return "latency" in self.match or budgets.latency is not None or budgets.throughput is not None


def read_compressions(
    path: Path, whole: Mapping[str, Mapping[str, Any]], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, Compression]:
    """Arms by name, from their settings with (`whole`) and without (`own`) what they share.

    Raises HalflapError on a setting that is unknown, wrong or the study's own, and on an arm that leans on none.
    """
    found = {name: _read(f"{path}, arm {name!r}", fields, own[name]) for name, fields in whole.items()}
    for name, arm in found.items():
        plain = [other for other, one in found.items() if other != name and not one.leans_on]
        for other in arm.leans_on:
            if other not in plain:
                raise HalflapError(
                    f"{path}: arm {name!r} leans on {other!r}, which is no other arm with a student of its own; "
                    f"those are {', '.join(plain) or 'none'}: name one of them"
                )
    return found


def _read(where: str, whole: Mapping[str, Any], own: Mapping[str, Any]) -> Compression:
    fields = dict(whole)
    control, of, match = (fields.pop(name, None) for name in ("control", "of", "match"))
    if (control is None) != (of is None) or control not in (None, *CONTROLS):
        raise HalflapError(
            f"{where}: a control is one of {', '.join(CONTROLS)} `of` another arm; give both, or neither"
        )
    if control is not None:
        allowed = {"control", "of", "against", "from", *(("tokens", "fit") if control == "scratch" else ())}
        if left := [name for name in own if name not in allowed]:
            raise HalflapError(f"{where}: {left[0]} is that of arm {of!r}, whose control this is; leave it out")
    if unknown := [name for name in match or {} if name not in MATCHED]:
        raise HalflapError(f"{where}: {unknown_name(unknown[0], list(MATCHED), 'budget to match')}")
    if JUDGED_ON in normalise(CompressRecipe, {n: own[n] for n in own if n in fields and n != "match"}, where)[0]:
        raise HalflapError(
            f"{where}: {JUDGED_ON} is not for one arm to set, since all are judged on the same; leave it out"
        )
    settings, _ = normalise(CompressRecipe, fields, where)
    if taken := [name for name in settings if name in STUDYS_OWN]:
        raise HalflapError(f"{where}: {taken[0]} is not for one arm to set; leave it out")
    try:
        call = bind({"compress": CompressRecipe}, ["compress"], settings | {"model": "teacher"})
    except RecipeError as error:
        raise HalflapError(f"{where}: {error}") from None
    assert call is not None  # help was not asked for
    recipe: CompressRecipe = call.recipe
    budgets = [name for name in BUDGETS if getattr(recipe.budgets, name) is not None]
    if not (control or match or budgets or recipe.sizes != Sizes()):
        raise HalflapError(f"{where}: nothing says how small the student shall be; give sizes, a budget or `match`")
    return Compression(recipe, control, of, match or {})
