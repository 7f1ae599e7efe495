"""Atomic writes: whole or not at all, and no litter."""

import errno
import hashlib

import pytest

from halflap.errors import HalflapError
from halflap.files import atomic_write, digest_file, write_json


def test_a_finished_write_appears_and_leaves_nothing_else(tmp_path):
    with atomic_write(tmp_path / "new" / "a.bin") as file:
        file.write(b"abc")
        assert not (tmp_path / "new" / "a.bin").exists()
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"abc"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target, "w") as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_named_with_its_place(tmp_path):
    full = f"the disk under {tmp_path} is full .*choose another --out"
    with pytest.raises(HalflapError, match=full), atomic_write(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="something else"), atomic_write(tmp_path / "a.bin"):
        raise OSError("something else")
    assert not list(tmp_path.iterdir())


def test_a_library_may_write_through_the_name(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file, open(file.name, "wb") as other:
        other.write(b"by name")
    assert (tmp_path / "a.txt").read_bytes() == b"by name"


def test_text_keeps_its_line_ends(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("é\r\nb\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\nb\n".encode()


def test_json_refuses_what_json_lacks(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
