"""Pieces add up to the decoded whole, never show half a character, and never show a stop string."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.inference.detokenize import TextStream, offsets


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is special and has no text."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def stream(ids: list[int], prompt: list[int] | None = None, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text = TextStream(Bytes(), prompt or [], stop)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.finish()], text


def test_the_window_stays_short_where_no_character_ends() -> None:
    seen: list[int] = []

    class Watched(Bytes):
        def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
            seen.append(len(ids := list(ids)))
            return super().decode(ids)

    text = TextStream(Watched())
    shown = "".join(text.push(0xE6) for _ in range(1000)) + text.finish()
    assert shown == "\ufffd" * 1000 and max(seen) < 200


@settings(max_examples=100)
@given(text=st.text(max_size=120), prompt=st.text(max_size=20))
def test_pieces_add_up(text: str, prompt: str) -> None:
    pieces, result = stream(list(text.encode()), list(prompt.encode()))
    assert "".join(pieces) == result.text == text
    assert all(piece == "" or piece in text for piece in pieces)


@settings(max_examples=100)
@given(text=st.text(max_size=120))
def test_offsets_are_where_a_token_s_character_begins(text: str) -> None:
    wanted = [place for place, letter in enumerate(text) for _ in letter.encode()]
    assert offsets(Bytes(), list(text.encode()), text) == wanted


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 256) | st.just(0xE6), max_size=400))
def test_bytes_that_are_no_text_add_up_too(ids: list[int]) -> None:
    pieces, result = stream(ids)
    assert "".join(pieces) == result.text == Bytes().decode(ids)


@settings(max_examples=100)
@given(text=st.text("abc", max_size=60), stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_never_show(text: str, stop: list[str]) -> None:
    result = TextStream(Bytes(), (), tuple(stop))
    shown = ""
    for token in text.encode():
        shown += result.push(token)
        if result.stopped:
            break
    shown += result.finish()
    ends = [text.find(word) + len(word) for word in stop if word in text]
    if not ends:
        assert not result.stopped and shown == text
        return
    came = text[: min(ends)]  # the text when the first stop string was complete
    assert result.stopped and shown == result.text == came[: min(came.find(w) for w in stop if w in came)]


def test_a_character_split_by_the_prompt_is_shown_whole() -> None:
    whole = "🙂!".encode()
    assert "".join(stream(list(whole[2:]), list(whole[:2]))[0]) == "🙂!"


@settings(max_examples=100)
@given(prompt=st.sampled_from(["a", "日", "🙂"]), cut=st.integers(1, 3), text=st.text("ab🙂", max_size=80))
def test_a_character_that_the_prompt_left_broken_is_not_the_replys(prompt: str, cut: int, text: str) -> None:
    pieces, result = stream(list(text.encode()), list((prompt + "🙂").encode()[:-cut]))
    assert "".join(pieces) == result.text == text
