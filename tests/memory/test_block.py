"""The codec of blocks, written out by hand, accepts exactly what the general one and the bounds of the fields allow."""

from __future__ import annotations

import base64
import hashlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import MalformedError, UsageError
from nexus.memory.block import (
    AFTER_MAX,
    BLOCK_BYTES_MAX,
    CONTENT,
    DATA_BYTES_MAX,
    DIMENSION_MAX,
    INT8,
    KIND_NAMES,
    LANG_BYTES_MAX,
    LINKS_MAX,
    MAP,
    MODEL_BYTES_MAX,
    PARENTS_MAX,
    PART_MAX,
    SCALE_MAX,
    SEALED,
    SKY_BYTES,
    SPEC,
    TAG_BYTES_MAX,
    TAGS_MAX,
    TEXT_BYTES_MAX,
    TIME_MAX_MS,
    TIME_MIN_MS,
    TITLE_BYTES_MAX,
    TOMBSTONE,
    VECTORS_MAX,
    Block,
    Vector,
    block_id,
    decode_block,
    encode_block,
    id_text,
    parse_id,
    split_ids,
)

# --- a second decoder, by the definition -----------------------------------------------------------------------------------------


def is_bytes(value: object, *lengths: int, most: int | None = None) -> bool:
    return type(value) is bytes and (len(value) in lengths if most is None else len(value) <= most)


def are_ids(value: object, most: int) -> bool:
    return type(value) is bytes and len(value) <= most * 32 and len(value) % 32 == 0


def is_uint(value: object, most: int, least: int = 0) -> bool:
    return type(value) is int and least <= value <= most


def is_text(value: object, most: int, *, line: bool = True) -> bool:
    return type(value) is str and len(value.encode()) <= most and (value.isprintable() or not line)


def is_vector(value: object) -> bool:
    if type(value) is not tuple or len(value) != 5:
        return False
    model, fingerprint, scheme, scale, codes = value
    return (
        is_text(model, MODEL_BYTES_MAX)
        and bool(model)
        and is_bytes(fingerprint, 32)
        and type(scheme) is int
        and scheme == INT8
        and is_uint(scale, SCALE_MAX, 1)
        and is_bytes(codes, most=DIMENSION_MAX)
        and bool(codes)
    )


def is_block(value: Value) -> bool:
    if type(value) is not tuple or len(value) != 18:
        return False
    (
        spec,
        kind,
        collection,
        author,
        created,
        expires,
        parents,
        links,
        data,
        sky,
        after,
        source,
        tags,
        title,
        lang,
        part,
        text,
        vectors,
    ) = value
    sound = (
        is_uint(spec, SPEC, SPEC)
        and is_uint(kind, MAP)
        and is_bytes(collection, 32)
        and is_bytes(author, 32)
        and is_uint(created, TIME_MAX_MS, TIME_MIN_MS)
        and is_uint(expires, TIME_MAX_MS)
        and (expires == 0 or expires > created)
        and are_ids(parents, PARENTS_MAX)
        and are_ids(links, LINKS_MAX)
        and is_bytes(data, most=DATA_BYTES_MAX)
        and is_bytes(sky, 0, SKY_BYTES)
        and are_ids(after, AFTER_MAX)
        and is_bytes(source, 0, 32)
        and type(tags) is tuple
        and len(tags) <= TAGS_MAX
        and all(is_text(tag, TAG_BYTES_MAX) and tag for tag in tags)
        and all(low < high for low, high in pairwise(tags))
        and is_text(title, TITLE_BYTES_MAX)
        and is_text(lang, LANG_BYTES_MAX)
        and is_uint(part, PART_MAX)
        and is_text(text, TEXT_BYTES_MAX, line=False)
        and type(vectors) is tuple
        and len(vectors) <= VECTORS_MAX
        and all(map(is_vector, vectors))
    )
    if not sound:
        return False
    empty = not (links or sky or source or tags or title or lang or part or text or vectors)
    return {
        CONTENT: not data and bool(text or source or vectors),
        TOMBSTONE: bool(parents) and not data and empty,
        SEALED: bool(data) and empty,
        MAP: bool(data) and not vectors,
    }[kind]


def expected_of(data: bytes) -> Value | None:
    """The values of a block that has these bytes, None if none has."""
    try:
        value = decode(data)
    except MalformedError:
        return None
    return value if len(data) <= BLOCK_BYTES_MAX and is_block(value) else None


def plain(block: Block) -> Value:
    return (SPEC, *block[:-1], tuple(map(tuple, block.vectors)))


def agrees(data: bytes) -> bool:
    """Whether it is a block; both decoders must say the same, and there is one encoding of what it says."""
    expected = expected_of(data)
    try:
        block = decode_block(data)
    except MalformedError:
        block = None
    assert expected == (None if block is None else plain(block))
    if block is None:
        return False
    assert encode_block(block) == data
    return True


# --- blocks ----------------------------------------------------------------------------------------------------------------------


def ids(most: int) -> st.SearchStrategy[bytes]:
    few = st.integers(0, min(most, 3)) | st.just(most)
    return few.flatmap(lambda count: st.binary(min_size=32, max_size=32).map(lambda one: one * count))


def texts(most: int, least: int = 0) -> st.SearchStrategy[str]:
    short = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=least, max_size=9)
    edges = st.sampled_from(["x" * length for length in (1, 23, 24, 255, 256, most) if length <= most])
    return (short | edges).filter(lambda text: text.isprintable() and len(text.encode()) <= most)


binaries = st.binary(min_size=1, max_size=30) | st.sampled_from([b"d" * length for length in (23, 24, 255, 256, 4096)])
vectors = st.builds(
    Vector,
    texts(MODEL_BYTES_MAX, 1).filter(bool),
    st.binary(min_size=32, max_size=32),
    st.just(INT8),
    st.sampled_from([1, 23, 24, 255, 256, 65535, 65536, SCALE_MAX]),
    binaries,
)
heads = {
    "collection": st.binary(min_size=32, max_size=32),
    "author": st.binary(min_size=32, max_size=32),
    "created_ms": st.integers(TIME_MIN_MS, TIME_MAX_MS - 1),
    "after": ids(AFTER_MAX),
}
open_fields = {
    "links": ids(LINKS_MAX),
    "sky": st.just(b"") | st.binary(min_size=SKY_BYTES, max_size=SKY_BYTES),
    "source": st.just(b"") | st.binary(min_size=32, max_size=32),
    "tags": st.sets(texts(TAG_BYTES_MAX, 1), max_size=TAGS_MAX).map(lambda tags: tuple(sorted(tags))),
    "title": texts(TITLE_BYTES_MAX),
    "lang": texts(LANG_BYTES_MAX),
    "part": st.sampled_from([0, 1, 23, 24, 255, 256, 65535, 65536, PART_MAX]),
}
long_texts = st.sampled_from(["words", "two\nlines\0", "é" * 200, "x" * TEXT_BYTES_MAX])


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    kind = draw(st.integers(CONTENT, MAP))
    fields = {name: draw(strategy) for name, strategy in heads.items()}
    if draw(st.booleans()):
        fields["expires_ms"] = draw(st.integers(fields["created_ms"] + 1, TIME_MAX_MS))
    fields["parents"] = draw(ids(PARENTS_MAX).filter(bool) if kind == TOMBSTONE else ids(PARENTS_MAX))
    if kind in (SEALED, MAP):
        fields["data"] = draw(binaries)
    if kind in (CONTENT, MAP):
        fields |= {name: draw(strategy) for name, strategy in open_fields.items()}
        fields["text"] = draw(long_texts if kind == CONTENT else long_texts | st.just(""))
    if kind == CONTENT:
        fields["vectors"] = tuple(draw(st.lists(vectors, max_size=VECTORS_MAX)))
    return Block(kind, **fields)


BLOCK = Block(
    CONTENT,
    b"c" * 32,
    b"a" * 32,
    1_700_000_000_000,
    1_800_000_000_000,
    b"p" * 32,
    b"l" * 64,
    b"",
    b"s" * SKY_BYTES,
    b"f" * 32,
    b"o" * 32,
    ("one", "two"),
    "title",
    "en",
    300,
    "a text of more than twenty-three bytes",
    (Vector("model", b"f" * 32, INT8, 123_456_789, b"\1\2\3"),),
)


@given(blocks())
def test_a_block_comes_back_and_has_one_encoding(block: Block) -> None:
    data = encode_block(block)
    assert decode_block(data) == block
    assert data == encode(plain(block))
    assert agrees(data)


def test_the_layout_does_not_change() -> None:
    """Ids are hashes of these bytes: another encoder would make other blocks of all that there are."""
    small = Block(CONTENT, b"c" * 32, b"a" * 32, 2**32, text="hi")
    expected = "92 01 00 5820" + "63" * 32 + "5820" + "61" * 32 + "1b 0000000100000000 00 40 40 40 40 40 40 80 60 60 00 62 6869 80"
    assert encode_block(small) == bytes.fromhex(expected.replace(" ", ""))
    assert hashlib.sha256(encode_block(BLOCK)).hexdigest() == "6c1743f3a5e161473f62f90e8f0f45ad3579b85ee42671d2899dc960fda74c07"


# --- what is not quite a block ---------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(blocks(), st.data())
def test_flipped_bits(block: Block, data: st.DataObject) -> None:
    changed = bytearray(encode_block(block))
    # Most of a long block is text: look at its start and its end more than at that.
    reach = min(len(changed), 400) * 8
    for _ in range(data.draw(st.integers(1, 3))):
        bit = data.draw(st.integers(0, reach - 1))
        changed[(bit // 8) if data.draw(st.booleans()) else -1 - bit // 8] ^= 1 << bit % 8
    agrees(bytes(changed))


@given(st.data())
def test_flipped_bits_of_a_small_block(data: st.DataObject) -> None:
    changed = bytearray(encode_block(BLOCK))
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    agrees(bytes(changed))


def test_every_byte_of_a_block_with_every_head_that_matters() -> None:
    """At every place: all types, with lengths of all forms; floats, tags, and what has no end."""
    good = encode_block(BLOCK._replace(text="t", sky=b"", links=b"", after=b"", source=b""))
    heads = [major << 5 | code for major in range(8) for code in (0, 1, 3, 23, 24, 25, 27, 31)]
    accepted = sum(agrees(good[:at] + bytes((head,)) + good[at + 1 :]) for at in range(80, len(good)) for head in heads)
    # Bytes of ids and codes may be any, those of heads hardly.
    assert 64 * len(heads) <= accepted <= (len(good) - 80 - 20) * len(heads)


def test_long_fields_have_no_other_heads() -> None:
    long = Vector("m" * 64, b"\xee" * 32, INT8, SCALE_MAX, b"\xee" * 300)
    content = BLOCK._replace(parents=b"\xee" * 320, links=b"\xee" * 64, title="t" * 256, text="q" * 300, vectors=(long,))
    mapped = Block(MAP, b"c" * 32, b"a" * 32, TIME_MIN_MS, data=b"\xee" * 300, tags=("g" * 64,), lang="l" * 24)
    seen = set()
    for good in map(encode_block, (content, mapped)):
        for at in range(80, len(good)):
            if good[at] in (0x58, 0x59, 0x78, 0x79):
                seen.add(good[at])
                for head in range(256):
                    assert agrees(good[:at] + bytes((head,)) + good[at + 1 :]) == (head == good[at]), (at, head)
    assert len(seen) == 4


@settings(max_examples=50)
@given(blocks(), st.data())
def test_cut_off_drawn_out_or_spliced(block: Block, data: st.DataObject) -> None:
    whole = encode_block(block)
    cut = data.draw(st.integers(0, min(len(whole), 600)))
    assert not agrees(whole[: len(whole) - cut - 1])
    assert not agrees(whole[:cut][:-1])
    assert not agrees(whole + data.draw(st.binary(min_size=1, max_size=3)))
    assert not agrees(whole[:cut] + data.draw(st.binary(min_size=1, max_size=3)) + whole[cut:]) or cut > 80
    other = encode_block(data.draw(blocks()))
    agrees(whole[:cut] + other[cut:])


def test_every_start_of_a_block_is_refused() -> None:
    whole = encode_block(BLOCK)
    assert not any(agrees(whole[:length]) for length in range(len(whole)))


@given(st.binary(max_size=120), st.integers(60, 100))
def test_noise(noise: bytes, kept: int) -> None:
    assert not agrees(noise)
    agrees(encode_block(BLOCK)[:kept] + noise)


def heads_of(value: Value, deviate: int | None, form: str, seen: list[int]) -> bytes:
    """CBOR, with one head that RFC 8949 allows and the deterministic encoding does not: that of item number `deviate`."""
    seen[0] += 1
    here = seen[0] - 1 == deviate
    if type(value) is int:
        major, argument, body = (0, value, b"") if value >= 0 else (1, -1 - value, b"")
    elif type(value) is bytes:
        major, argument, body = 2, len(value), value
    elif type(value) is str:
        major, argument, body = 3, len(value.encode()), value.encode()
    else:
        parts = [heads_of(item, deviate, form, seen) for item in value]  # type: ignore[union-attr]
        major, argument, body = 4, len(parts), b"".join(parts)
    if not here:
        return encode(value) if major < 4 else encode((0,) * argument)[: -argument or None] + body
    if form == "wide":
        wider = next((width for width in (1, 2, 4) if argument < (24 if width == 1 else 1 << (4 * width))), 8)
        return bytes((major << 5 | {1: 24, 2: 25, 4: 26, 8: 27}[wider],)) + argument.to_bytes(wider, "big") + body
    if form == "widest":
        return bytes((major << 5 | 27,)) + argument.to_bytes(8, "big") + body
    if form == "indefinite":
        chunk = body if major == 4 else heads_of(value, None, "", [0])
        return bytes((major << 5 | 31,)) + chunk + b"\xff"
    if form == "tagged":
        return b"\xc1" + heads_of(value, None, "", [0])
    other = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5}[major]
    return bytes((heads_of(value, None, "", [0])[0] & 31 | other << 5,)) + heads_of(value, None, "", [0])[1:]


def items(value: Value) -> int:
    return 1 + (sum(map(items, value)) if type(value) is tuple else 0)


@pytest.mark.parametrize("form", ["wide", "widest", "indefinite", "tagged", "swapped"])
@settings(max_examples=15)
@given(block=blocks() | st.just(BLOCK))
def test_heads_in_another_form_are_refused_wherever_they_are(form: str, block: Block) -> None:
    value = plain(block)
    assert heads_of(value, None, form, [0]) == encode_block(block)
    for at in range(items(value)):
        changed = heads_of(value, at, form, [0])
        # A time of eight bytes is in its shortest form already.
        assert changed == encode_block(block) or not agrees(changed)


PIECES: list[Value] = [
    *(0, 1, 2, 3, 4, 23, 24, 255, 256, -1, -(2**40), PART_MAX, PART_MAX + 1, SCALE_MAX, SCALE_MAX + 1),
    *(TIME_MIN_MS - 1, TIME_MIN_MS, TIME_MAX_MS, TIME_MAX_MS + 1, 2**64 - 1),
    *(bytes(length) for length in (0, 1, 31, 32, 33, 64, 97, SKY_BYTES, 99, 128, 129, 160, 512, 544, 1024, 1056, DIMENSION_MAX)),
    *(bytes(length) for length in (DIMENSION_MAX + 1, DATA_BYTES_MAX, DATA_BYTES_MAX + 1)),
    *("x" * length for length in (0, 1, 32, 33, 64, 65, 256, 257, TEXT_BYTES_MAX, TEXT_BYTES_MAX + 1)),
    *("line\nbreak", "\x7f", "\u200b", "é" * 32, "é" * 33),
    *((), ("a",), ("a", "b"), ("b", "a"), ("a", "a"), ("",), ("a\n",), ("x" * 65,), (b"a",), (1,), ((),), "abcdefghij"),
    tuple(f"{number:02}" for number in range(TAGS_MAX)),
    tuple(f"{number:02}" for number in range(TAGS_MAX + 1)),
    *((("m", bytes(32), INT8, 1, b"\1"),) * count for count in range(1, VECTORS_MAX + 2)),
    *(((model, bytes(32), INT8, 1, b"\1"),) for model in ("", "m" * 64, "m" * 65, "m\n", b"m", 0)),
    *((("m", fingerprint, INT8, 1, b"\1"),) for fingerprint in (b"", bytes(31), bytes(33), "f" * 32, 1)),
    *((("m", bytes(32), scheme, 1, b"\1"),) for scheme in (0, 2, -1, 24, b"\1", "\1", ())),
    *((("m", bytes(32), INT8, scale, b"\1"),) for scale in (0, 2**32, SCALE_MAX + 1, -1, b"", "")),
    *((("m", bytes(32), INT8, 1, codes),) for codes in (b"", bytes(DIMENSION_MAX), bytes(DIMENSION_MAX + 1), "a", 1, ())),
    (("m", bytes(32), INT8, 1),),
    (("m", bytes(32), INT8, 1, b"\1", 0),),
]


@pytest.mark.parametrize("at", range(18))
def test_every_field_with_values_at_and_beyond_its_bounds(at: int) -> None:
    kinds = [
        BLOCK,
        Block(CONTENT, b"c" * 32, b"a" * 32, TIME_MIN_MS, text="t"),
        Block(TOMBSTONE, b"c" * 32, b"a" * 32, TIME_MIN_MS, parents=bytes(32)),
        Block(SEALED, b"c" * 32, b"a" * 32, TIME_MIN_MS, data=b"d"),
        Block(MAP, b"c" * 32, b"a" * 32, TIME_MIN_MS, data=b"d", title="t"),
    ]
    verdicts = set()
    for block in kinds:
        values = list(plain(block))  # type: ignore[arg-type]
        for piece in PIECES:
            verdicts.add(agrees(encode([*values[:at], piece, *values[at + 1 :]])))
    assert verdicts == {True, False}


@settings(max_examples=50)
@given(blocks(), st.lists(st.tuples(st.integers(0, 17), st.sampled_from(PIECES)), min_size=1, max_size=3))
def test_some_fields_of_other_values(block: Block, changes: list[tuple[int, Value]]) -> None:
    values = list(plain(block))  # type: ignore[arg-type]
    for at, piece in changes:
        values[at] = piece
    agrees(encode(values))


def test_more_or_fewer_fields() -> None:
    values = list(plain(BLOCK))  # type: ignore[arg-type]
    for other in (values[:-1], [*values, 0], [values], [], 0, b"", "block"):
        assert not agrees(encode(other))


def test_a_block_has_no_more_bytes_than_one_may() -> None:
    vector = Vector("m" * MODEL_BYTES_MAX, bytes(32), INT8, SCALE_MAX, bytes(DIMENSION_MAX))
    full = BLOCK._replace(text="x" * TEXT_BYTES_MAX, links=bytes(LINKS_MAX * 32), vectors=(vector,) * VECTORS_MAX)
    assert agrees(encode_block(full))
    assert len(encode_block(full)) <= BLOCK_BYTES_MAX
    mapped = Block(MAP, b"c" * 32, b"a" * 32, TIME_MIN_MS, data=bytes(DATA_BYTES_MAX), text="x" * TEXT_BYTES_MAX)
    with pytest.raises(UsageError, match="bytes"):
        encode_block(mapped)
    assert not agrees(encode(plain(mapped)))
    with pytest.raises(MalformedError):
        decode_block(bytes(BLOCK_BYTES_MAX + 1))


def test_what_is_no_block_is_not_encoded() -> None:
    for wrong in ({"text": "x" * (TEXT_BYTES_MAX + 1)}, {"kind": 4}, {"created_ms": 1}, {"tags": ("b", "a")}, {"title": "a\n"}):
        with pytest.raises(UsageError, match="this is no block"):
            encode_block(BLOCK._replace(**wrong))  # type: ignore[arg-type]


# --- ids -------------------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32))
def test_an_id_is_a_cid_and_back(identifier: bytes) -> None:
    text = id_text(identifier)
    assert text.startswith("bafkrei")
    assert len(text) == 59
    assert parse_id(text) == identifier
    # By the definition: multibase base32, version 1, codec raw (0x55), multihash sha2-256 (0x12) of 32 bytes.
    unpadded = base64.b32encode(b"\x01\x55\x12\x20" + identifier).decode().lower().rstrip("=")
    assert text == "b" + unpadded


def test_an_id_is_what_other_software_computes() -> None:
    data = b"hello world"
    assert block_id(data) == hashlib.sha256(data).digest()
    # `ipfs add --cid-version 1 --raw-leaves` of a file with these eleven bytes.
    assert id_text(block_id(data)) == "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"


@given(st.binary(min_size=32, max_size=32), st.integers(0, 58), st.characters())
def test_another_text_is_no_id_or_the_id_of_something_else(identifier: bytes, at: int, letter: str) -> None:
    text = id_text(identifier)
    changed = text[:at] + letter + text[at + 1 :]
    try:
        found = parse_id(changed)
    except MalformedError:
        return
    assert id_text(found) == changed
    assert (found == identifier) == (changed == text)


@pytest.mark.parametrize(
    "text",
    ["", "b", "bafkrei", "B" + id_text(bytes(32))[1:].upper(), id_text(bytes(32)) + "a", id_text(bytes(32))[:-1] + "b", "é" * 59]
    + ["b" + base64.b32encode(head + bytes(32)).decode().lower().rstrip("=") for head in (b"\1\x70\x12\x20", b"\1\x55\x1b\x20")],
)
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_id(text)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=5))
def test_joined_ids_come_apart(joined: list[bytes]) -> None:
    assert list(split_ids(b"".join(joined))) == joined


def test_every_kind_has_a_name() -> None:
    assert [KIND_NAMES[kind] for kind in (CONTENT, TOMBSTONE, SEALED, MAP)] == ["content", "tombstone", "sealed", "map"]
