from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nexus.core.errors import ModelFormatError
from nexus.engine import safetensors_check
from nexus.engine.safetensors_check import check_safetensors, encode_header


def build(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.float16), "c": np.array(3, np.int64)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    raw = (tmp_path / "x").read_bytes()
    specs = check_safetensors(tmp_path / "x")
    assert specs.keys() == tensors.keys()
    for name, spec in specs.items():
        assert spec.shape == tensors[name].shape
        assert raw[spec.start : spec.end] == tensors[name].tobytes()


BAD = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header over the file": build({}, length=1000),
    "header over 100 MB": build({}, length=100_000_001),
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "not JSON": build(b"{nope"),
    "not UTF-8": build(b'{"\xff": 1}'),
    "a list": build([]),
    "deep": build(b"[" * 50_000),
    "twice": build(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "metadata of numbers": build({"__metadata__": {"a": 1}}),
    "metadata as a list": build({"__metadata__": []}),
    "missing field": build({"a": {"dtype": "U8", "shape": [0]}}),
    "extra field": build({"a": {**entry(0, 0), "more": 1}}),
    "not an object": build({"a": 3}),
    "unknown dtype": build({"a": entry(0, 4, [1], "F31")}, bytes(4)),
    "dtype of another type": build({"a": {**entry(0, 4), "dtype": ["F32"]}}, bytes(4)),
    "negative shape": build({"a": entry(0, 4, [-1, -4])}, bytes(4)),
    "shape of booleans": build({"a": entry(0, 1, [True])}, bytes(1)),
    "shape of floats": build({"a": entry(0, 1, [1.0])}, bytes(1)),
    "shape NaN": build(b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}'),
    "shape that wraps around 64 bits": build({"a": entry(0, 0, [2**40, 2**40])}),
    "shape with zero and huge": build({"a": entry(0, 1, [2**47, 2**47])}, bytes(1)),
    "too many dimensions": build({"a": entry(0, 1, [1] * 9)}, bytes(1)),
    "byte count": build({"a": entry(0, 3, [4])}, bytes(3)),
    "backwards": build({"a": {**entry(0, 0), "data_offsets": [4, 0]}}, bytes(4)),
    "one offset": build({"a": {**entry(0, 0), "data_offsets": [0]}}),
    "negative offset": build({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, bytes(4)),
    "overlap": build({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "same place": build({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "hole": build({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8)),
    "hole at the start": build({"a": entry(1, 4)}, bytes(4)),
    "beyond the end": build({"a": entry(0, 8)}, bytes(4)),
    "bytes behind the last": build({"a": entry(0, 4)}, bytes(5)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_flaw_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(ModelFormatError) as caught:
        check_safetensors(path)
    assert "model.safetensors" in caught.value.cause
    assert caught.value.fix


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_check, "TENSORS_MAX", 3)
    path = tmp_path / "x"
    path.write_bytes(build({str(i): entry(i, i + 1) for i in range(3)}, bytes(3)))
    assert len(check_safetensors(path)) == 3
    path.write_bytes(build({str(i): entry(i, i + 1) for i in range(4)}, bytes(4)))
    with pytest.raises(ModelFormatError, match="4 tensors"):
        check_safetensors(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cannot be read"):
        check_safetensors(tmp_path / "none")
    with pytest.raises(ModelFormatError):
        check_safetensors(tmp_path)


@settings(max_examples=300)
@given(data=st.data())
def test_no_damage_gets_past_what_the_library_refuses(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Flip, cut or add bytes anywhere: the check either refuses, or the library reads the same tensors."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    save_file({"a": np.arange(4, dtype=np.float32), "bb": np.ones((2, 2), np.float16)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        if not raw:
            break
    path.write_bytes(raw)
    try:
        specs = check_safetensors(path)
    except ModelFormatError:
        return
    try:
        with safe_open(path, "numpy") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: spec.shape for name, spec in specs.items()
            }
    except SafetensorError as error:
        pytest.fail(f"the library refuses what the check lets through: {error}")


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), SHAPES, max_size=6), st.randoms()
)
def test_our_header_is_one_per_content_and_sound(shapes: dict[str, tuple[int, ...]], random: Any) -> None:
    listed = [(name, "F32", shape) for name, shape in shapes.items()]
    header = encode_header(listed)
    random.shuffle(listed)
    assert encode_header(listed) == header
    assert len(header) % 64 == 0
    data = bytes(sum(4 * int(np.prod(shape, dtype=int)) for shape in shapes.values()))
    specs = safetensors_check._parse(header[8:], len(header), len(header) + len(data))
    assert {name: spec.shape for name, spec in specs.items()} == shapes
