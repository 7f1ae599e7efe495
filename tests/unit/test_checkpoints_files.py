"""Safetensors on disk: what is read, how broken files are refused, and that a write is all or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halflap.checkpoints import files
from halflap.checkpoints.files import TensorSpec, digest_entry, open_tensors, read_header, read_tensor, write_shards
from halflap.errors import HalflapError

CODES = ["F32", "BF16", "F16", "F64", "I64", "U8"]


def tensors_of(value: float, names: str = "abcd") -> dict[str, torch.Tensor]:
    return {name: torch.full((4, 3), value + i) for i, name in enumerate(names)}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(files.CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def write(directory: Path, tensors: dict[str, torch.Tensor], **options) -> None:
    write_shards(directory, specs_of(tensors), tensors.items(), **options)


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in open_tensors(directory).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@settings(max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    codes=st.lists(st.sampled_from(CODES), min_size=6, max_size=6),
    limit=st.integers(1, 600),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back_by_us_and_by_safetensors(tmp_path_factory, shapes, codes, limit, seed):
    directory = tmp_path_factory.mktemp("round")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": (torch.randn(shape, generator=generator) * 50).to(files.DTYPES[codes[i]])
        for i, shape in enumerate(shapes)
    }
    order = torch.randperm(len(tensors), generator=generator).tolist()
    write_shards(directory, specs_of(tensors), ((f"t{i}", tensors[f"t{i}"]) for i in order), max_shard_bytes=limit)
    assert same(read(directory), tensors)
    loaded = {}
    for shard in directory.glob("*.safetensors"):
        loaded |= safetensors.torch.load_file(shard)
    assert same(loaded, tensors)


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {"x": torch.randn(3, 4).to(torch.bfloat16), "y": torch.randn(()), "z": torch.zeros(0, 3)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert same(read(tmp_path), tensors)


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path):
    write(tmp_path, tensors_of(0.0), max_shard_bytes=100)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert read_header(tmp_path / "model-00001-of-00002.safetensors").keys() == {"a", "b"}


# ---- broken input


def broken(tmp_path: Path, change) -> str:
    write(tmp_path, tensors_of(1.0))
    file = tmp_path / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(HalflapError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert "model.safetensors" in message and "\n" not in message
    return message


@pytest.mark.parametrize("kept", [0, 5, 40, 200, -1, -60])
def test_a_truncated_file_is_named(tmp_path, kept):
    assert "truncated" in broken(tmp_path, lambda data: data[:kept])


def test_trailing_bytes_are_corruption(tmp_path):
    assert "corrupt" in broken(tmp_path, lambda data: data + b"x")


def test_a_header_that_is_no_json_is_corruption(tmp_path):
    assert "corrupt" in broken(tmp_path, lambda data: data[:8] + b"?" * 20 + data[28:])


def test_a_header_whose_offsets_lie_is_corruption(tmp_path):
    assert "corrupt" in broken(tmp_path, lambda data: data.replace(b"[4,3]", b"[4,4]"))


def test_an_unknown_type_is_refused_by_name(tmp_path):
    assert "'F31'" in broken(tmp_path, lambda data: data.replace(b'"F32"', b'"F31"'))


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    assert "git lfs pull" in broken(tmp_path, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n")


def test_a_file_cut_short_after_its_header_was_read_is_an_error(tmp_path):
    write(tmp_path, tensors_of(1.0))
    entry = open_tensors(tmp_path)["d"]
    os.truncate(entry.file, entry.start + 3)
    with pytest.raises(HalflapError, match="shorter"):
        read_tensor(entry)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, tensors_of(0.0), max_shard_bytes=100)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HalflapError, match=r"model-00002-of-00002\.safetensors .* is missing"):
        open_tensors(tmp_path)


def test_a_shard_without_the_tensor_its_index_promises_is_named(tmp_path):
    write(tmp_path, tensors_of(0.0), max_shard_bytes=100)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(HalflapError, match="tensor b is not in shard model-00001-of-00002"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(HalflapError, match=r"index\.json is corrupt"):
        open_tensors(tmp_path)


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(HalflapError, match="outside its directory"):
        open_tensors(tmp_path)


def test_shards_without_an_index_are_refused(tmp_path):
    write(tmp_path, tensors_of(0.0), max_shard_bytes=100)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(HalflapError, match="2 safetensors files but no"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(HalflapError, match=f"pickled weights \\({name}\\)"):
        open_tensors(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(HalflapError, match="has no weights"):
        open_tensors(tmp_path)


# ---- writing


@pytest.mark.parametrize(
    "stream, complaint",
    [
        ("abc", "never came, the first is d"),
        ("abcda", "tensor a comes twice"),
        ("abcdx", "tensor x is not among"),
    ],
)
def test_a_stream_that_does_not_fit_leaves_the_old_weights(tmp_path, stream, complaint):
    old = tensors_of(1.0)
    write(tmp_path, old)
    new = tensors_of(9.0, "abcdx")
    with pytest.raises(HalflapError, match=complaint):
        write_shards(tmp_path, specs_of(old), ((name, new[name]) for name in stream))
    assert same(read(tmp_path), old) and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_wrong_shape_is_refused(tmp_path):
    with pytest.raises(HalflapError, match=r"tensor a has shape \(2,\) and the config says \(3,\)"):
        write_shards(tmp_path, {"a": TensorSpec("F32", (3,))}, [("a", torch.zeros(2))])


def test_any_failure_of_the_stream_leaves_the_old_weights(tmp_path):
    old = tensors_of(1.0)
    write(tmp_path, old)

    def stream():
        yield "a", torch.zeros(4, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, specs_of(old), stream())
    assert same(read(tmp_path), old) and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_more_than_the_free_space_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(HalflapError, match=r"needs more than the .* MB free"):
        write_shards(tmp_path, {"a": TensorSpec("F32", (1 << 25, 1 << 25))}, [])
    assert list(tmp_path.iterdir()) == []


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    preamble = "import os, sys, torch\nfrom pathlib import Path\nfrom halflap.checkpoints.files import *\n"
    return subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs file size limits")
def test_a_place_that_cannot_be_a_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HalflapError, match=r"file.*cannot be made .*give another directory"):
            write(place, tensors_of(0))


def test_a_full_disk_is_named_and_leaves_the_old_weights(tmp_path):
    write(tmp_path, tensors_of(1.0))
    done = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write_shards(Path(sys.argv[1]), {"a": TensorSpec("F32", (40_000,))}, [("a", torch.zeros(40_000))])
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "full" in done.stdout and "what was there before stays" in done.stdout, done.stderr
    assert same(read(tmp_path), tensors_of(1.0)) and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux counts it")
def test_memory_stays_at_one_tensor(tmp_path):
    """32 tensors of 8 MiB go in and out; the resident peak grows by a few of them, not by 256 MiB."""
    done = run(
        """
        import resource
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        specs = {f"t{i}": TensorSpec("BF16", (4, 1 << 20)) for i in range(32)}
        start = peak()
        stream = ((n, torch.full((4, 1 << 20), float(i))) for i, n in enumerate(specs))
        write_shards(Path(sys.argv[1]), specs, stream, max_shard_bytes=1 << 26)
        entries = open_tensors(Path(sys.argv[1]))
        for i, name in enumerate(specs):
            assert read_tensor(entries[name])[0, 0].item() == i
        print(peak() - start)
        """,
        tmp_path,
    )
    assert float(done.stdout) < 80, (done.stdout, done.stderr)


def killed_child(work) -> None:
    """Run `work` in a forked child, which must end by SIGKILL or well."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before, after", [(1000, 1000), (1000, 60), (60, 1000), (60, 60), (100, 60)])
def test_a_kill_at_any_point_leaves_all_old_or_all_new(tmp_path, monkeypatch, before, after):
    """before, after: shard sizes; all pairs of one file and many."""
    old, new = tensors_of(1.0), tensors_of(9.0)
    steps = {"replace": os.replace, "unlink": os.unlink, "open": os.open}
    outcomes = []
    for point in range(14):
        directory = tmp_path / str(point)
        write(directory, old, max_shard_bytes=before)
        left = [point]

        def dying(real, left=left):
            def call(*arguments, **options):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*arguments, **options)

            return call

        def work(directory=directory, dying=dying):
            for name, real in steps.items():
                setattr(os, name, dying(real))
            write(directory, new, max_shard_bytes=after)

        killed_child(work)
        found = read(directory)
        assert same(found, old) or same(found, new), point
        outcomes.append(same(found, new))
        write(directory, new, max_shard_bytes=after)  # and the next write works and tidies up
        assert same(read(directory), new)
        assert not list(directory.glob(".model*safetensors.*-*.tmp"))
    assert outcomes[0] is False and outcomes == sorted(outcomes)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_of_the_data_leaves_the_old_weights(tmp_path):
    old = tensors_of(1.0)
    write(tmp_path, old)

    def stream():
        yield "a", torch.zeros(4, 3)
        os.kill(os.getpid(), signal.SIGKILL)

    killed_child(lambda: write_shards(tmp_path, specs_of(old), stream()))
    assert len(list(tmp_path.glob(".model*.tmp"))) == 1
    assert same(read(tmp_path), old)
    write(tmp_path, tensors_of(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_old_shards_are_removed_when_fewer_replace_them(tmp_path):
    write(tmp_path, tensors_of(1.0), max_shard_bytes=60)
    write(tmp_path, tensors_of(2.0), max_shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and same(read(tmp_path), tensors_of(2.0))
    write(tmp_path, tensors_of(3.0))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] and same(read(tmp_path), tensors_of(3.0))


def test_the_digest_sees_small_tensors_whole_and_any_broad_change_of_large_ones(tmp_path):
    large = torch.arange(1 << 20, dtype=torch.float32)
    small = torch.zeros(1000)

    def digests(**tensors):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        write(directory, tensors)
        return {name: digest_entry(entry) for name, entry in open_tensors(directory).items()}

    first = digests(large=large, small=small)
    assert digests(large=large, small=small) == first
    touched = small.clone()
    touched[777] = 1
    second = digests(large=large * 1.0001, small=touched)
    assert second["large"] != first["large"] and second["small"] != first["small"]
    assert digests(large=large.double(), small=small)["large"] != first["large"]
    for place in (0, -1):
        changed = large.clone()
        changed[place] += 5
        assert digests(large=changed, small=small)["large"] != first["large"]
