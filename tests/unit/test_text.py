"""Reading documents: every kind and compression, order, and errors that say what to do."""

import gzip
import json
import lzma
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halflap.data.text import cut_into_pieces, hash_position, held_out_from, list_files, read_documents
from halflap.errors import HalflapError

DOCUMENTS = ["first\r\n document é", "second 👩‍🚀", "third\n\n", " "]


def compressors():
    zstandard = pytest.importorskip("zstandard")
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def as_lines(column="text"):
    return "".join(json.dumps({column: text, "n": 1}) + "\n" for text in DOCUMENTS).encode()


def as_list():
    return json.dumps([{"text": text} for text in DOCUMENTS], indent=2).encode()


def as_parquet(column="text"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"id": list(range(len(DOCUMENTS))), column: DOCUMENTS}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def read(*paths, **options):
    return list(read_documents(paths, **options))


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize(
    ("kind", "content"), [(".jsonl", as_lines), (".json", as_lines), (".json", as_list), (".parquet", as_parquet)]
)
def test_every_kind_and_compression_gives_the_same_documents(tmp_path, kind, content, compression):
    file = tmp_path / f"data.v1{kind}{compression}"
    file.write_bytes(compressors()[compression](content()))
    assert read(file) == DOCUMENTS


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
def test_a_text_file_is_one_document_unchanged(tmp_path, compression):
    file = tmp_path / f"a.txt{compression}"
    file.write_bytes(compressors()[compression]("é\r\n\n b".encode()))
    assert read(file) == ["é\r\n\n b"]


def test_several_frames_and_members_are_read_to_the_end(tmp_path):
    for compression, compress in compressors().items():
        file = tmp_path / f"a.jsonl{compression}"
        file.write_bytes(compress(as_lines()) + compress(as_lines()))
        assert read(file) == DOCUMENTS * 2


def test_folders_are_read_recursively_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b/1.txt", "a/2.txt", "a/10.txt", "c.txt", ".cache/x.txt", "a/.hidden.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/10.txt", "a/2.txt", "b/1.txt", "c.txt"]
    assert [file.name for file in list_files([tmp_path / "c.txt", tmp_path / "b"])] == ["c.txt", "1.txt"]


def test_a_single_json_object_and_an_indented_one_are_documents(tmp_path):
    for number, indent in enumerate((None, 2)):
        file = tmp_path / f"{number}.json"
        file.write_text("\n" + json.dumps({"text": "one"}, indent=indent))
        assert read(file) == ["one"]


def test_empty_documents_blank_lines_and_byte_order_marks_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": ""}\r\n{"text": "b"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfc")
    assert read(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON .*; correct that line"),
        ("a.jsonl", b'{"text": "a"}\n{"te', r"a\.jsonl:2 is not valid JSON .*; the file seems cut off; copy it again"),
        ("a.json", b'[{"text": "a"},\n{"text" 1}]', r"a\.json:2 is not valid JSON"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            r"a\.jsonl:1 has no column 'text'; its columns are body, id: .*data\.field",
        ),
        ("a.jsonl", b'{"text": null}\n', r"column 'text' of .*a\.jsonl:1 holds null, and text is needed"),
        ("a.jsonl", b'"a"\n', r"a\.jsonl:1 holds a string, and an object with a column 'text' is needed"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 holds half of a UTF-16 pair at character 0"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1 is not UTF-8 \(byte 10\)"),
        ("a.txt", b"ab\xff", r"a\.txt' is not UTF-8 text \(byte 2 is 0xff\)"),
        ("a.txt", b"", r"a\.txt' holds no text; give files with at least one non-empty document"),
        ("a.json", b"", r"holds no text"),
        ("a.json", b"[]", r"holds no text"),
        ("a.parquet", b"PAR1 no", r"a\.parquet' is no readable parquet file"),
        ("a.csv", b"a,b", r"a\.csv' is no kind of text file known here; allowed are \.txt, \.jsonl, \.json, \.parquet"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz' is damaged or cut off .*; copy or download it again"),
        ("a.txt.xz", b"plain", r"a\.txt\.xz' is damaged or cut off"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst' is damaged or cut off"),
    ],
)
def test_broken_content_is_one_sentence_with_the_place(tmp_path, name, content, sentence):
    compressors()
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(HalflapError, match=sentence):
        read(file)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_cut_off_file_is_noticed_after_its_readable_part(tmp_path, compression):
    lines = "".join(json.dumps({"text": f"{i} {i**3} {i**5 % 977}"}) + "\n" for i in range(20000)).encode()
    whole = compressors()[compression](lines)
    file = tmp_path / f"a.jsonl{compression}"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HalflapError, match="is damaged or cut off"):
        read(file)


def test_a_missing_parquet_column_names_the_columns(tmp_path):
    (tmp_path / "a.parquet").write_bytes(as_parquet("content"))
    with pytest.raises(HalflapError, match=r"has no column 'text'; its columns are id, content"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", field="content") == DOCUMENTS


def test_missing_and_useless_paths(tmp_path):
    with pytest.raises(HalflapError, match=r"data path 'no/such.txt' does not exist \(looked for /"):
        read("no/such.txt")
    with pytest.raises(HalflapError, match="holds no file to read; allowed are"):
        read(tmp_path)
    with pytest.raises(HalflapError, match="no data was given"):
        read()
    with pytest.raises(HalflapError, match="are a list"):
        list(read_documents("a.txt"))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(HalflapError, match="is a folder of token shards, and text is needed here"):
        read(tmp_path)


def test_held_out_is_the_last_share_by_hash_whatever_the_order():
    texts = [f"document {number}" for number in range(400)]
    border = held_out_from(texts, 0.05)
    held = [text for text in texts if hash_position(text) >= border]
    assert len(held) == 20
    assert held_out_from(reversed(texts), 0.05) == border
    assert held_out_from(texts * 2, 0.05) == border  # a repeated document is one document
    assert held_out_from(texts, 0.2) < border  # a larger share contains the smaller one


def test_held_out_is_never_nothing_and_refuses_what_cannot_be_split():
    assert 0 < held_out_from(["one", "two", "three"], 0.01) == max(map(hash_position, ("one", "two", "three")))
    assert held_out_from(["one", "one"]) == math.inf  # a single document cannot be split
    with pytest.raises(HalflapError, match=r"share is 1\.5"):
        held_out_from(["a", "b"], 1.5)


@given(st.text(alphabet="ab \n", max_size=400), st.integers(5, 60))
def test_pieces_make_up_the_text_and_have_about_the_asked_size(text: str, characters: int):
    pieces = cut_into_pieces(text, characters)
    assert "".join(pieces) == text
    assert all(characters / 2 <= len(piece) <= 1.5 * characters for piece in pieces[:-1])
