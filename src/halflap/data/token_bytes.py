"""How many bytes of text one token can stand for, which bounds what can fit a context before it is encoded.

There is a bound where every token stands for what its vocabulary spells and no text is dropped on the way: BPE over
bytes, or that falls back to bytes. A token for whatever is unknown, or one that takes in the space around it, has none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

KEEPING = {None, "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}  # pre-tokenizers that drop nothing
COMPOSED = 4  # times that a text may shrink under NFC: a letter of 2 bytes may come as 7
Part = Mapping[str, Any] | None


def longest_token(content: str) -> int | None:
    """Bytes that a token of a `tokenizer.json` stands for at most, or None where there is no bound."""
    about = json.loads(content)
    model, added = about["model"], about.get("added_tokens") or ()
    parts = list(_parts(about.get("pre_tokenizer"), "pretokenizers"))
    shrinks = [_shrinks(part) for part in _parts(about.get("normalizer"), "normalizers")]
    if (
        model.get("type") != "BPE"
        or None in shrinks
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
        or any(_type(part) not in KEEPING or (part or {}).get("behavior") == "Removed" for part in parts)
    ):
        return None
    vocabulary = model["vocab"]
    if any(_type(part) == "ByteLevel" for part in parts):  # a character of the vocabulary is a byte
        needed, longest = pre_tokenizers.ByteLevel.alphabet(), max(map(len, vocabulary))
    elif model.get("byte_fallback"):
        needed, longest = [f"<0x{byte:02X}>" for byte in range(256)], max(len(token.encode()) for token in vocabulary)
    else:
        return None
    if not all(token in vocabulary for token in needed):
        return None
    longest = max([longest, *(len(token["content"].encode()) for token in added)])
    return longest * (COMPOSED if any(shrinks) else 1)


def _parts(part: Part, members: str) -> Iterator[Part]:
    """A step of a tokenizer, or those of a sequence of them."""
    if _type(part) != "Sequence":
        yield part
        return
    for member in (part or {})[members]:
        yield from _parts(member, members)


def _type(part: Part) -> str | None:
    return None if part is None else part["type"]


def _shrinks(normalizer: Part) -> bool | None:
    """Whether a text may have fewer bytes afterwards; None where nothing bounds how many."""
    match normalizer:
        case None | {"type": "Prepend"}:
            return False
        case {"type": "NFC"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return None if len(new.encode()) < len(old.encode()) else False
        case _:
            return None
