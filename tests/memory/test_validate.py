"""What is refused, why, and whose fault that is; and that every node refuses alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.core.errors import MalformedError
from nexus.core.keys import Identity
from nexus.memory.batch import OpenedBlock, open_batch, sign_batch
from nexus.memory.block import (
    CONTENT,
    INT8,
    MAP,
    SEALED,
    TOMBSTONE,
    Block,
    Vector,
    decode_block,
    encode_block,
)
from nexus.memory.collection import PRIVATE, PUBLIC, WRITERS, Charter, create, revoke
from nexus.memory.quantise import quantise, read_codes
from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import SIGNATURE_BYTES, SKY_MODEL, SkyStamp
from nexus.memory.validate import AHEAD_MAX_MS, Fault, Refusal, sound_vectors, validate

OWNER, WRITER, OTHER = (Identity(bytes((letter,)) * 32) for letter in b"owx")
NOW = 1_700_000_000_000
PLAIN = create(OWNER.public_key, "news", PUBLIC, NOW)
BARE = create(OWNER.public_key, "bare", PUBLIC, NOW, sky_step=0)
LISTED = create(OWNER.public_key, "notes", WRITERS, NOW, writers=[WRITER.public_key])
SECRET = create(OWNER.public_key, "diary", PRIVATE, NOW, writers=[WRITER.public_key], key_hash=bytes(32))
MAIN = create(OWNER.public_key, "main", PUBLIC, NOW, sky_step=10)
CHARTERS = {charter.id: charter for charter in (PLAIN, BARE, LISTED, SECRET, MAIN)}


def vector(values: Sequence[float] = (0.6, -0.8), fingerprint: bytes = bytes(32)) -> Vector:
    codes, scales = quantise([values])
    return Vector("m", fingerprint, INT8, int(scales[0]), codes[0].tobytes())


def stamp(step: int = 100, model: bytes = SKY_MODEL, signature: bytes = bytes(SIGNATURE_BYTES)) -> bytes:
    return SkyStamp(model, Cell(step, 0, 0), signature).to_bytes()


GOOD_STAMP, WRONG = stamp(), b"w" * SIGNATURE_BYTES


def block(charter: Charter = MAIN, author: Identity = OTHER, **fields: object) -> Block:
    plain: dict[str, object] = {"kind": CONTENT, "created_ms": NOW}
    if fields.get("kind", CONTENT) == CONTENT:
        plain["text"] = "words"
    return Block(collection=charter.id, author=author.public_key, **(plain | fields))  # type: ignore[arg-type]


def opened(*blocks: Block) -> list[OpenedBlock]:
    return [OpenedBlock(bytes((at,)) * 32, b"", decode_block(encode_block(entry)), at) for at, entry in enumerate(blocks, 1)]


def any_sky(times: NDArray[np.int64], stamps: list[bytes]) -> NDArray[np.bool_]:
    assert len(times) == len(stamps) > 0
    return np.array([not entry.endswith(WRONG) for entry in stamps])


def refusals(*blocks: Block, now_ms: int = NOW, charters: dict[bytes, Charter] = CHARTERS) -> list[Refusal | None]:
    return validate(opened(*blocks), charters.get, any_sky, now_ms)


CASES = [
    (block(), None),
    (block(PLAIN, sky=GOOD_STAMP, vectors=(vector(), vector(fingerprint=b"2" * 32))), None),
    (block(LISTED, WRITER), None),
    (block(LISTED, OWNER, kind=MAP, data=b"d"), None),
    (block(SECRET, OWNER, kind=SEALED, data=b"d"), None),
    (block(SECRET, WRITER, kind=TOMBSTONE, parents=b"p" * 32), None),
    (block(kind=TOMBSTONE, parents=b"p" * 32), None),
    (block(created_ms=NOW + AHEAD_MAX_MS, expires_ms=NOW + AHEAD_MAX_MS + 1), None),
    (block(sky=stamp(10)), None),
    (block(created_ms=NOW + AHEAD_MAX_MS + 1), Refusal.FUTURE),
    (block(created_ms=NOW - 2, expires_ms=NOW), Refusal.EXPIRED),
    (block(create(OTHER.public_key, "news", PUBLIC, NOW)), Refusal.UNKNOWN_COLLECTION),
    (block(LISTED, OTHER), Refusal.FOREIGN_AUTHOR),
    (block(SECRET, OTHER, kind=SEALED, data=b"d"), Refusal.FOREIGN_AUTHOR),
    (block(kind=SEALED, data=b"d"), Refusal.SEALED_IN_PUBLIC),
    (block(LISTED, WRITER, kind=SEALED, data=b"d"), Refusal.SEALED_IN_PUBLIC),
    (block(SECRET, WRITER), Refusal.OPEN_IN_PRIVATE),
    (block(SECRET, WRITER, kind=MAP, data=b"d"), Refusal.OPEN_IN_PRIVATE),
    (block(PLAIN, sky=stamp(50)), Refusal.PLACE_TOO_EXACT),
    (block(PLAIN, sky=stamp(50, signature=WRONG)), Refusal.PLACE_TOO_EXACT),
    (block(BARE, sky=stamp(1000)), Refusal.PLACE_TOO_EXACT),
    (block(sky=stamp(model=bytes(8))), Refusal.UNKNOWN_SKY),
    (block(sky=stamp(signature=WRONG)), Refusal.WRONG_SKY),
    (block(vectors=(vector(), vector((1.0, 0.0)))), Refusal.BAD_VECTOR),
    (block(vectors=(vector(), vector(fingerprint=b"2" * 32)._replace(scale=1))), Refusal.BAD_VECTOR),
    (block(vectors=(vector()._replace(codes=bytes(2)),)), Refusal.BAD_VECTOR),
    # Of length 1, all three: with the code -128, alone and beside a 127; and with no code of 127.
    (block(vectors=(vector()._replace(codes=b"\x80\x00", scale=992_187_500),)), Refusal.BAD_VECTOR),
    (block(vectors=(vector()._replace(codes=b"\x80\x7f", scale=704_330_000),)), Refusal.BAD_VECTOR),
    (block(vectors=(vector()._replace(codes=b"\x64\x00", scale=1_270_000_000),)), Refusal.BAD_VECTOR),
]


@pytest.mark.parametrize(("entry", "expected"), CASES, ids=lambda value: value.code if isinstance(value, Refusal) else None)
def test_a_block_is_refused_for_what_is_wrong_with_it(entry: Block, expected: Refusal | None) -> None:
    assert refusals(entry) == [expected]


@given(st.lists(st.sampled_from(CASES), max_size=40))
def test_many_at_once_are_refused_as_they_would_be_alone(cases: list[tuple[Block, Refusal | None]]) -> None:
    assert refusals(*(entry for entry, _ in cases)) == [expected for _, expected in cases]


def test_every_reason_is_given_in_some_case_and_says_whose_fault_it_is() -> None:
    assert {expected for _, expected in CASES} | {Refusal.NAMES_ITSELF, None} == {*Refusal, None}
    assert len({refusal.code for refusal in Refusal}) == len(Refusal)
    at_fault = {refusal for refusal in Refusal if refusal.fault is Fault.SENDER}
    assert at_fault == {Refusal.WRONG_SKY, Refusal.BAD_VECTOR, Refusal.NAMES_ITSELF}
    assert [refusal for refusal in Refusal if refusal.later] == [Refusal.FUTURE]


@pytest.mark.parametrize("field", ["parents", "links", "after"])
def test_a_block_does_not_refer_to_itself(field: str) -> None:
    for joined, expected in (
        (b"\1" * 32, Refusal.NAMES_ITSELF),
        (b"\2" * 32 + b"\1" * 32, Refusal.NAMES_ITSELF),
        (b"\2" * 32, None),
    ):
        assert refusals(block(**{field: joined})) == [expected]


def test_a_block_from_the_future_is_good_later() -> None:
    entry = block(created_ms=NOW + AHEAD_MAX_MS + 1)
    assert refusals(entry) == [Refusal.FUTURE]
    assert refusals(entry, now_ms=NOW + 1) == [None]


def test_what_a_writer_dates_after_it_was_revoked_is_refused_and_what_it_wrote_before_stays() -> None:
    later = revoke(LISTED, WRITER.public_key, issued_ms=NOW)
    cases = [block(LISTED, WRITER, created_ms=NOW + late) for late in (0, 1)]
    assert refusals(*cases, charters={later.id: later}) == [None, Refusal.FOREIGN_AUTHOR]
    # It would not be good later either.
    far = block(LISTED, WRITER, created_ms=NOW + AHEAD_MAX_MS + 1)
    assert refusals(far, charters={later.id: later}) == [Refusal.FOREIGN_AUTHOR]


def test_each_collection_and_author_is_looked_up_once_and_no_sky_is_asked_for_where_there_is_none() -> None:
    asked = []

    def find(collection: bytes) -> Charter | None:
        asked.append(collection)
        return CHARTERS.get(collection)

    def no_sky(times: NDArray[np.int64], stamps: list[bytes]) -> NDArray[np.bool_]:
        raise AssertionError("nothing to check")

    blocks = opened(*[block(), block(PLAIN), block(BARE, sky=stamp())] * 5)
    validate(blocks, find, no_sky, NOW)
    assert sorted(asked) == sorted((MAIN.id, PLAIN.id, BARE.id))
    assert validate([], find, no_sky, NOW) == []


def test_blocks_of_a_signed_batch_pass() -> None:
    entries = [encode_block(block(text=str(number), vectors=(vector(),))) for number in range(50)]
    assert validate(open_batch(sign_batch(OTHER, entries)), CHARTERS.get, any_sky, NOW) == [None] * 50


def is_sound(entry: Vector) -> bool:
    try:
        read_codes(entry.codes, entry.scale)
    except MalformedError:
        return False
    return True


@st.composite
def any_vectors(draw: st.DrawFn) -> Vector:
    """About half of them sound, many just beside it."""
    size = draw(st.sampled_from([1, 2, 3, 20, 384, 1024, 1025, 4096]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = random.normal(size=size)
    codes, scales = quantise([values / np.linalg.norm(values)])
    changed = bytearray(codes.tobytes())
    if draw(st.booleans()):
        changed[draw(st.integers(0, size - 1))] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0x81, 0xFF]))
    scale = int(int(scales[0]) * draw(st.sampled_from([1.0, 1.0, 0.9799, 0.9801, 1.0199, 1.0201, 0.5, 1.9])))
    return Vector("m", bytes(32), INT8, max(1, min(scale, 2_000_000_000)), bytes(changed))


@given(st.lists(any_vectors(), max_size=8))
def test_vectors_pass_that_can_be_read_and_no_others(entries: list[Vector]) -> None:
    assert sound_vectors(entries).tolist() == [is_sound(entry) for entry in entries]
