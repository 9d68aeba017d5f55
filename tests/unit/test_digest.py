"""Content digests: fixed vectors, the same for any layout, different for any change of content."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterhub_tools.errors import StoreError
from adapterhub_tools.model.base import StoredTensor
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.store import digest
from adapterhub_tools.store.checkpoint import open_checkpoint
from adapterhub_tools.store.digest import (
    ALGORITHMS,
    DEFAULT,
    TensorHasher,
    advise,
    digest_checkpoint,
    root_digest,
)
from adapterhub_tools.store.files import LocalFile
from adapterhub_tools.store.layout import build_file

Content = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, data

SHA256 = "tensor-tree-sha256-v1"
# Computed from the formulas in docs/manifest.md with struct, hashlib and blake3 alone.
VECTORS: Content = {
    "w": ("F32", (2, 3), bytes.fromhex("000000000000803f000000c00000003f6f12833ae6b1617f")),
    "b.é": ("BF16", (4,), bytes.fromhex("803f00400080807f")),
    "scalar": ("I64", (), bytes.fromhex("ffffffffffffffff")),
    "none": ("U8", (0, 5), b""),
}
TENSOR_VECTORS = {
    DEFAULT: {
        "w": "42fa48a727589d767142fd54d697166cbaa96018d10c0a32a9d5b38c0dd47564",
        "b.é": "b54638e8c73e5fcf951c38cda840288aabfcd8e6914fc9228dda4ba3caae55dd",
        "scalar": "4049a5b358ae7b0930a63563501f1fb23c56299b19932e229370a249620b182c",
        "none": "f1616ad4195ce8d4cda7fc3c776e880975d685d578e1b8202784af00b77e579b",
    },
    SHA256: {
        "w": "8e78481cf94d3a50c1e08c15cd3d9019b4af69c30ff7e013c655f0fffb730cfe",
        "b.é": "6134a7fd37916e4c81d8db28eb1aa646575a70ca6959e4314be6d1b937c1053a",
        "scalar": "628daf0bac1571eae2ba5f4d9de883d8f888d9cfaa534188dcb254b961882507",
        "none": "3c92097723f64df4304d6607b312fc0421af35a29c30ab1aaebbd29fea272677",
    },
}
ROOT_VECTORS = {
    DEFAULT: "b8c9547677e22295f96087ecf69f2839b88e9c89f20f3bb0bdde06598b42bbb0",
    SHA256: "5f8c5c97076de2e545deba70f25f0e97c341a2488fabd8ebe9eb05d605af61ec",
}
EMPTY_ROOT_VECTORS = {
    DEFAULT: "a0b65e8ad4a3477375fc3e6ab671c46701544c4911c58838b3ad4c6597cd8743",
    SHA256: "fc560b6d4a0812edcca35a51fa84ee7596177d5ea722dba715f29de43b6f7b1c",
}


def write(path: Path, content: Content, metadata: Mapping[str, str] = {}) -> None:
    specs = [TensorSpec(name=name, dtype=dtype, shape=shape) for name, (dtype, shape, _) in content.items()]
    head, offsets = build_file(specs, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + b"".join(content[name][2] for name in offsets))


def write_shards(root: Path, content: Content, count: int, *, reverse: bool = False) -> None:
    items = list(content.items())
    if reverse:
        items.reverse()
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(items[number::count])
        if part:
            write(root / shard, part, {"shard": str(number)})
            weight_map.update(dict.fromkeys(part, shard))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def root_of(path: Path, algorithm: str = DEFAULT, **options: int) -> str:
    return root_digest(algorithm, digest_checkpoint(open_checkpoint(path), algorithm=algorithm, **options))


def sample(seed: int = 0) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns ten tensors of random bytes; the last two have the same dtype and shape as the first."""
    rng = random.Random(seed)
    shapes = [("F32", (3, 4)), ("BF16", (8,)), ("F16", (2, 2, 2)), ("F64", ()), ("I64", (1, 3)), ("U8", (5,)),
              ("BF16", (16, 16)), ("F32", (0, 3)), ("F32", (3, 4)), ("F32", (3, 4))]  # fmt: skip
    specs = [
        TensorSpec(name=f"layer.{i}", dtype=dtype, shape=shape) for i, (dtype, shape) in enumerate(shapes)
    ]
    return {spec.name: (spec.dtype, spec.shape, rng.randbytes(spec.nbytes)) for spec in specs}


# --- vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_tensor_vectors(algorithm: str, pieces: int) -> None:
    for name, (dtype, shape, data) in VECTORS.items():
        hasher = TensorHasher(algorithm, TensorSpec(name=name, dtype=dtype, shape=shape))
        for start in range(0, len(data), pieces):
            hasher.update(memoryview(data)[start : start + pieces])
        assert hasher.digest().hex() == TENSOR_VECTORS[algorithm][name]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_root_vectors(algorithm: str, tmp_path: Path) -> None:
    tensors = {name: bytes.fromhex(text) for name, text in TENSOR_VECTORS[algorithm].items()}
    assert root_digest(algorithm, tensors) == f"{algorithm}:{ROOT_VECTORS[algorithm]}"
    assert root_digest(algorithm, {}) == f"{algorithm}:{EMPTY_ROOT_VECTORS[algorithm]}"
    write(tmp_path / "model.safetensors", VECTORS)
    assert root_of(tmp_path, algorithm) == f"{algorithm}:{ROOT_VECTORS[algorithm]}"


def test_names_are_ordered_by_their_utf8_bytes() -> None:
    """U+FF5A sorts before U+1F600 as bytes and as code points, but after it as UTF-16 units."""
    names = ["z", "é", "\uff5a", "\U0001f600", "Z", ""]
    digests = {name: bytes([number] * 32) for number, name in enumerate(names)}
    text = b"".join(
        struct.pack("<Q", len(name.encode())) + name.encode() + digests[name]
        for name in ("", "Z", "z", "é", "\uff5a", "\U0001f600")
    )
    head = b"adaptertool:tensor-tree-v1:root\0" + struct.pack("<Q", 6)
    assert root_digest(SHA256, digests) == f"{SHA256}:{hashlib.sha256(head + text).hexdigest()}"


# --- the same whatever the layout --------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shards_order_padding_metadata_and_threads_do_not_matter(tmp_path: Path, algorithm: str) -> None:
    content = sample()
    write(tmp_path / "one" / "model.safetensors", content)
    expected = root_of(tmp_path / "one", algorithm)
    for shards, reverse in itertools.product((1, 2, 7), (False, True)):
        root = tmp_path / f"{shards}{reverse}"
        root.mkdir()
        write_shards(root, content, shards, reverse=reverse)
        for threads in (1, 2, 7):
            assert root_of(root, algorithm, threads=threads) == expected
    backwards = dict(reversed(list(content.items())))
    write(tmp_path / "back" / "model.safetensors", backwards, {"format": "pt", "note": "x" * 100})
    assert root_of(tmp_path / "back", algorithm) == expected
    data = bytearray((tmp_path / "one" / "model.safetensors").read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size : 8 + size] = b" " * 13  # a longer header, the data no longer aligned
    data[:8] = (size + 13).to_bytes(8, "little")
    (tmp_path / "padded").mkdir()
    (tmp_path / "padded" / "model.safetensors").write_bytes(data)
    assert root_of(tmp_path / "padded", algorithm) == expected


def test_a_file_that_the_format_s_library_wrote(tmp_path: Path) -> None:
    dtypes = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "U8": "u1"}
    content = {name: tensor for name, tensor in sample().items() if tensor[0] in dtypes}
    arrays = {
        name: np.frombuffer(data, dtypes[dtype]).reshape(shape)
        for name, (dtype, shape, data) in content.items()
    }
    (tmp_path / "theirs").mkdir()
    save_file(arrays, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    write(tmp_path / "ours" / "model.safetensors", content)
    assert root_of(tmp_path / "theirs") == root_of(tmp_path / "ours")


def test_a_part_of_the_tensors(tmp_path: Path) -> None:
    content = sample()
    write(tmp_path / "model.safetensors", content)
    checkpoint = open_checkpoint(tmp_path)
    whole = digest_checkpoint(checkpoint)
    assert list(whole) == sorted(content)
    names = ["layer.3", "layer.1"]
    assert digest_checkpoint(checkpoint, names=names) == {name: whole[name] for name in sorted(names)}
    assert digest_checkpoint(checkpoint, names=[]) == {}
    with pytest.raises(KeyError):
        digest_checkpoint(checkpoint, names=["nothing"])


# --- different for any change ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_thousand_flipped_bits(tmp_path: Path, algorithm: str) -> None:
    """Each flip in a file gives another root, and changes the digest of its own tensor alone."""
    path = tmp_path / "model.safetensors"
    write(path, sample())
    checkpoint = open_checkpoint(tmp_path)
    before = digest_checkpoint(checkpoint, algorithm=algorithm, threads=1)
    clean = path.read_bytes()
    start = checkpoint.headers["model.safetensors"].data_start
    rng = random.Random(1)
    bits = rng.sample(range(8 * start, 8 * len(clean)), 1000)
    roots = {root_digest(algorithm, before)}
    for bit in bits:
        data = bytearray(clean)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        after = digest_checkpoint(open_checkpoint(tmp_path), algorithm=algorithm, threads=1)
        owner = [
            name
            for name, tensor in checkpoint.tensors.items()
            if tensor.offset <= bit // 8 < tensor.offset + tensor.nbytes
        ]
        assert [name for name in before if before[name] != after[name]] == owner
        roots.add(root_digest(algorithm, after))
    assert len(roots) == 1001


def variants(content: Content) -> dict[str, Content]:
    """Returns contents that each differ from the given one in one way."""
    made: dict[str, Content] = {}
    for one, two in itertools.combinations(content, 2):
        made[f"swap {one} {two}"] = {**content, one: content[two], two: content[one]}
    for name, (dtype, shape, data) in content.items():
        rest = {other: tensor for other, tensor in content.items() if other != name}
        made[f"without {name}"] = rest
        for new in (name + "x", name[:-1], name.upper(), "a", "ä"):
            made[f"rename {name} {new}"] = {**rest, new: content[name]}
        twins = {"F32": ["I32", "U32"], "BF16": ["F16", "I16", "U16"], "F16": ["BF16"], "F64": ["I64"],
                 "I64": ["F64"], "U8": ["I8", "BOOL", "F8_E4M3"]}  # fmt: skip
        for other in twins[dtype]:
            made[f"dtype {name} {other}"] = {**rest, name: (other, shape, data)}
        for other in ((*shape, 1), (1, *shape), shape[::-1]):
            if other != shape:
                made[f"shape {name} {other}"] = {**rest, name: (dtype, other, data)}
    made["one more"] = {**content, "more": ("U8", (0,), b"")}
    a, b = content["layer.8"][2], content["layer.9"][2]
    made["bytes from one tensor to the next"] = {
        **content,
        "layer.8": ("F32", (13,), a + b[:4]),
        "layer.9": ("F32", (11,), b[4:]),
    }
    return made


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_swaps_renames_dtypes_and_shapes(tmp_path: Path, algorithm: str) -> None:
    content = sample()
    roots = {}
    for number, (change, variant) in enumerate({"none": content, **variants(content)}.items()):
        write(tmp_path / f"{number}" / "model.safetensors", variant)
        roots.setdefault(root_of(tmp_path / f"{number}", algorithm, threads=1), []).append(change)
    assert len(roots) > 100
    assert [changes for changes in roots.values() if len(changes) > 1] == []


def test_tensor_and_root_cannot_be_confused() -> None:
    """Without their domains, a tensor's bytes could be chosen so that its digest is a root."""
    spec = TensorSpec(name="x", dtype="U8", shape=(0,))
    assert TensorHasher(DEFAULT, spec).digest().hex() != EMPTY_ROOT_VECTORS[DEFAULT]


def test_the_algorithms_differ() -> None:
    assert ROOT_VECTORS[DEFAULT] != ROOT_VECTORS[SHA256]


# --- reading -----------------------------------------------------------------------------------------


def test_pieces_and_dropped_pages_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"a": ("U8", (100_003,), random.Random(2).randbytes(100_003)), "b": ("U8", (1,), b"x")}
    write(tmp_path / "model.safetensors", content)
    expected = root_of(tmp_path)
    advices = []

    def noted(source: LocalFile, offset: int, length: int, advice: str) -> None:
        advices.append(advice)
        advise(source, offset, length, advice)

    monkeypatch.setattr(digest, "advise", noted)
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 4096)
    assert root_of(tmp_path) == expected
    assert "DONTNEED" not in advices
    monkeypatch.setattr(digest, "_memory_bytes", lambda: 100_000)
    assert root_of(tmp_path) == expected
    assert "DONTNEED" in advices


def test_advice_may_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"1")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(digest.os, "posix_fadvise", fail, raising=False)
    with LocalFile(tmp_path / "x", name="x") as source:
        advise(source, 0, 1, "SEQUENTIAL")
        advise(source, 0, 1, "NO_SUCH_ADVICE")


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.done = 0
        self.lock = threading.Lock()

    def start(self, what: str, total_bytes: int) -> None:
        self.calls.append((what, total_bytes))

    def advance(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes

    def finish(self) -> None:
        self.calls.append(("finish", self.done))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", sample())
    checkpoint, progress = open_checkpoint(tmp_path), Recorder()
    digest_checkpoint(checkpoint, progress=progress)
    assert progress.calls == [("hash", checkpoint.nbytes), ("finish", checkpoint.nbytes)]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_changed_since_it_was_opened(tmp_path: Path, threads: int) -> None:
    write(tmp_path / "model.safetensors", sample())
    checkpoint = open_checkpoint(tmp_path)
    write(tmp_path / "model.safetensors", sample(1))
    with pytest.raises(StoreError, match=r"^model\.safetensors: the file was changed"):
        digest_checkpoint(checkpoint, threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_changed_while_it_is_hashed(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write(path, sample())
    checkpoint = open_checkpoint(tmp_path)
    tensor_digest = digest._Job.digest

    def then_append(self: digest._Job, source: LocalFile, tensor: StoredTensor, buffer: memoryview) -> bytes:
        found = tensor_digest(self, source, tensor, buffer)
        with path.open("ab") as file:
            file.write(b"x")
        return found

    monkeypatch.setattr(digest._Job, "digest", then_append)
    with pytest.raises(StoreError, match="changed"):
        digest_checkpoint(checkpoint, threads=threads)


def test_one_failing_thread_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The large tensor is given up half-way once another tensor cannot be read."""
    size = 1_000_000
    content = {"large": ("U8", (size,), bytes(size)), "small": ("U8", (1,), b"x")}
    write(tmp_path / "model.safetensors", content)
    checkpoint = open_checkpoint(tmp_path)
    small_failed, pieces = threading.Event(), []
    read_into = LocalFile.read_into

    def read(self: LocalFile, view: memoryview, offset: int) -> None:
        if offset == checkpoint.tensors["small"].offset:
            small_failed.set()
            raise StoreError.of("io", "failed.", file=self.name)
        pieces.append(offset)
        assert small_failed.wait(10)
        if len(pieces) > 1:
            time.sleep(0.01)  # let the failing thread say so
        read_into(self, view, offset)

    monkeypatch.setattr(LocalFile, "read_into", read)
    monkeypatch.setattr(digest, "_CHUNK_BYTES", 1000)
    with pytest.raises(StoreError, match="failed"):
        digest_checkpoint(checkpoint, threads=2)
    assert len(pieces) < 500


def test_the_hasher_counts() -> None:
    spec = TensorSpec(name="x", dtype="F32", shape=(2,))
    for data in (b"", bytes(7), bytes(9)):
        hasher = TensorHasher(DEFAULT, spec)
        hasher.update(data)
        with pytest.raises(ValueError, match="differs from its size"):
            hasher.digest()
    hasher = TensorHasher(DEFAULT, spec)
    values = memoryview(struct.pack("<2f", 1, 2))
    hasher.update(values.cast("f").cast("B").cast("f", (2, 1)))  # counted in bytes, not in elements
    hasher.update(np.zeros((0, 2), "<f4").data)
    bytewise = TensorHasher(DEFAULT, spec)
    bytewise.update(bytearray(values))
    assert hasher.digest() == bytewise.digest()
