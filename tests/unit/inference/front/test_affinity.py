"""Requests that begin alike meet at one replica, conversations stay where they were, and no queue gets long."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from halflap.inference.front.affinity import (
    CONTINUED,
    MOST_PLACES,
    MOST_WORTH,
    STEP,
    Affinity,
    Load,
    choose,
    places,
)

TURN = st.builds(
    lambda role, text, times: {"role": role, "content": text * times},
    st.sampled_from(["system", "user", "assistant"]),
    st.text(max_size=30),
    st.integers(0, 40),
)
IDLE = {0: Load(0, 0), 1: Load(0, 0)}


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


@given(st.lists(TURN, min_size=1, max_size=6), st.lists(TURN, max_size=4))
def test_a_conversation_that_goes_on_has_the_places_of_the_one_before(
    before: list[dict[str, Any]], more: list[dict[str, Any]]
) -> None:
    first, longer = places({"messages": before}), places({"messages": before + more})
    assert {place.digest for place in first} <= {place.digest for place in longer}
    assert [place.characters for place in longer] == sorted(place.characters for place in longer)


@given(st.text(min_size=STEP + 1, max_size=4000), st.text(max_size=4000))
def test_a_text_that_goes_on_has_the_places_of_the_one_before(text: str, more: str) -> None:
    assert set(places({"prompt": text})) <= set(places({"prompt": text + more}))


@given(st.text(min_size=1, max_size=2000), st.integers(0, 1999))
def test_texts_part_at_the_first_character_that_differs(text: str, at: int) -> None:
    at %= len(text)
    other = text[:at] + ("b" if text[at] == "a" else "a") + text[at + 1 :]
    shared = set(places({"prompt": text})) & set(places({"prompt": other}))
    assert all(place.characters <= at for place in shared)


def test_places_of_whatever_a_body_may_hold() -> None:
    ids = list(range(1000))
    assert set(places({"prompt": ids})) < set(places({"prompt": [*ids, *ids]}))
    assert places({"prompt": ["a" * 600, "b"]}) == places({"prompt": "a" * 600})
    assert places({"context": "a" * 600}) == places({"prompt": "a" * 600})
    tools = {"tools": [{"type": "function"}], **chat("hi")}
    assert places(tools) != places(chat("hi"))
    for odd in ({}, {"prompt": None}, {"messages": []}, {"messages": [3, None]}, {"prompt": "\ud800"}, {"prompt": []}):
        places(odd)
    assert len(places({"prompt": "x" * 8_000_000})) < 200
    assert len(places({"messages": [{"role": "user", "content": "x"}] * 5000})) == MOST_PLACES


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=40), st.integers(1, 8))
def test_the_table_stays_small_and_forgets(steps: list[tuple[int, int]], entries: int) -> None:
    affinity = Affinity(entries)
    for replica, text in steps:
        affinity.remember(places({"prompt": f"{text}"}), replica)
        assert affinity.worth(places({"prompt": f"{text}"}))[replica] == CONTINUED
        assert len(affinity._read) <= entries
    for replica in range(4):
        affinity.forget(replica)
    assert not affinity._read


@given(
    st.dictionaries(st.integers(0, 5), st.floats(0, MOST_WORTH)),
    st.dictionaries(st.integers(0, 5), st.builds(Load, st.integers(0, 200), st.integers(0, 9)), min_size=1),
)
def test_no_choice_is_much_busier_than_another(worth: dict[int, float], loads: dict[int, Load]) -> None:
    chosen = choose(worth, loads)
    least = min(load.running for load in loads.values())
    assert loads[chosen].running <= least + worth.get(chosen, 0.0)
    assert all(
        loads[other].running - worth.get(other, 0.0) >= loads[chosen].running - worth.get(chosen, 0.0)
        for other in loads
    )


def test_new_texts_are_shared_out() -> None:
    affinity, served = Affinity(), {0: 0, 1: 0}
    for number in range(10):
        asked = places(chat(f"question {number}"))
        replica = choose(affinity.worth(asked), {r: Load(0, served[r]) for r in served})
        affinity.remember(asked, replica)
        served[replica] += 1
    assert served == {0: 5, 1: 5}


@given(st.lists(st.text(max_size=50), min_size=1, max_size=5), st.integers(0, 1), st.integers(0, int(CONTINUED) - 1))
def test_a_conversation_stays_where_it_was(texts: list[str], replica: int, busier: int) -> None:
    affinity = Affinity()
    affinity.remember(places(chat(*texts)), replica)
    worth = affinity.worth(places(chat(*texts, "reply", "and now?")))
    assert choose(worth, {replica: Load(busier, 9), 1 - replica: Load(0, 0)}) == replica
    assert choose(worth, {replica: Load(100, 9), 1 - replica: Load(0, 0)}) == 1 - replica


def test_a_short_beginning_that_all_share_does_not_gather_them() -> None:
    system = {"role": "system", "content": "You are a helpful assistant."}
    affinity = Affinity()
    affinity.remember(places({"messages": [system, *chat("one")["messages"]]}), 0)
    asked = places({"messages": [system, *chat("two")["messages"]]})
    assert choose(affinity.worth(asked), {0: Load(1, 1), 1: Load(0, 0)}) == 1
    long = {"role": "system", "content": "You know this handbook. " * 500}
    affinity.remember(places({"messages": [long, *chat("one")["messages"]]}), 0)
    asked = places({"messages": [long, *chat("two")["messages"]]})
    assert choose(affinity.worth(asked), {0: Load(5, 1), 1: Load(0, 0)}) == 0
