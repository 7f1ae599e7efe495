"""Choose the demo's text: a small, fixed share of freely licensed corpora, by the hash of each document.

Usage: python demo/make_text.py CORPORA   (a folder with books/, textbooks/, techdocs/, code_python/, each with
train.jsonl.xz and validation.jsonl.xz). Writes demo/text/{train,validation}.jsonl.xz; every row keeps its source
and licence. The files are in the repository, so that nobody needs to run this to see the demo.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path

# characters taken from each corpus: training and validation
SHARES = {
    "books": (2_600_000, 150_000),
    "textbooks": (900_000, 60_000),
    "techdocs": (2_000_000, 120_000),
    "code_python": (1_600_000, 120_000),
}
LONGEST_DOCUMENT = 30_000
KEPT_FIELDS = ("title", "author", "path", "package", "version", "source", "license")


def documents(path: Path) -> list[dict[str, str]]:
    """Rows in the order of the SHA-256 of their text: a fixed shuffle that no other tool needs to know."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())


def choose(rows: list[dict[str, str]], characters: int) -> list[dict[str, str]]:
    chosen: list[dict[str, str]] = []
    for row in rows:
        if characters <= 0:
            break
        text = row["text"][: min(LONGEST_DOCUMENT, characters)]
        chosen.append({"text": text} | {key: row[key] for key in KEPT_FIELDS if key in row})
        characters -= len(text)
    return chosen


def main(corpora: Path, out: Path) -> None:
    for part, name in enumerate(("train", "validation")):
        with lzma.open(out / f"{name}.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
            for corpus, shares in SHARES.items():
                for row in choose(documents(corpora / corpus / f"{name}.jsonl.xz"), shares[part]):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "text")
