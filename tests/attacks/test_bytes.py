"""Bytes that are made to mislead, to overwhelm, or to mean two things: refused before they cost anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import cbor2
import pytest
import trio

from nexus.core import hashing
from nexus.core.encoding import decode, encode
from nexus.core.errors import MalformedError, NexusError, NotFoundError, VerificationError
from nexus.core.hashing import HASH_BYTES, leaf_hash
from nexus.network.transport import ProtocolSpec
from nexus.node.audit.messages import AUDIT
from nexus.node.environment import SYSTEM
from nexus.node.evidence import EVIDENCE
from nexus.node.infer.messages import INFER, LINK
from nexus.node.ledger import LEDGER
from nexus.node.membership import NODE
from nexus.proof.audit import OPENING_BYTES_MAX, SIBLINGS_MAX, OpenedRow
from nexus.proof.evidence import EVIDENCE_BYTES_MAX, OP, Evidence, verify_evidence
from nexus.proof.evidence.operation import Proof
from nexus.swarm.membership import RECORD_LIFETIME_MS, SignedNodeRecord
from tests.attacks.arena import Arena, Model, open_arena
from tests.attacks.catalogue import Row
from tests.attacks.test_audits import suspension_case

PATHS = ("layer_path", "step_path", "siblings", "path", "peaks", "path_before")


async def proof_against(arena: Arena) -> Evidence:
    await arena.ask("replica")
    (true,) = await arena.evidence()
    return true


def bent(path: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
    """Every way but the right one."""
    ways = [path[:-1], path[1:], (*path, bytes(32)), path[::-1], (bytes(32),) * len(path), (bytes(32),) * SIBLINGS_MAX]
    ways += [(*path[:at], leaf_hash(path[at]), *path[at + 1 :]) for at in range(len(path))]
    return [way for way in ways if way != path]


def with_bent_paths(proof: Proof) -> Iterator[Proof]:
    """A true proof with one of its Merkle paths bent."""
    for part in ("cells", "rows", "inputs", "outputs", "records", "logs", "weights"):
        shown = getattr(proof, part)
        for number, one in enumerate(shown):
            for name in (field.name for field in fields(one) if field.name in PATHS):
                for way in bent(getattr(one, name)):
                    changed = replace(one, **{name: way})
                    yield replace(proof, **{part: (*shown[:number], changed, *shown[number + 1 :])})


async def test_malformed_merkle_paths(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Not even a cheater is convicted by a proof of which one path is bent, and nobody else ever."""
    async with open_arena(tiny, tmp_path, {1: "flipped-bit"}) as arena:
        true = await proof_against(arena)
        tried = 0
        for lie in with_bent_paths(Proof.from_bytes(true.body)):
            with pytest.raises((MalformedError, VerificationError, NotFoundError)):
                verify_evidence(replace(true, body=lie.to_bytes()))
            tried += 1
        assert tried > 25
        for size, index, siblings in ((4, 1, 63), (4, 4, 2), (0, 0, 0), (2**62, 1, 2)):
            with pytest.raises(VerificationError):
                hashing.verify_merkle_proof(bytes(32), size, index, leaf_hash(b""), (bytes(32),) * siblings)
        assert [await arena.outcome(n) for n in (0, 2, 3, 4)] == [row.outcome] * 4


def never(*_: object, **__: object) -> bytes:
    raise AssertionError("something was computed")


async def test_huge_openings(tiny: Model, tmp_path: Path, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is multiplied for what is out of bounds, nothing hashed but what came, no frame read beyond what it may have."""
    async with open_arena(tiny, tmp_path, {1: "flipped-bit"}) as arena:
        true = await proof_against(arena)
        proof = Proof.from_bytes(true.body)
        hashed: list[int] = []

        def counted(data: bytes) -> bytes:
            hashed.append(len(data))
            return leaf_hash(data)

        siblings = encode((b"", (bytes(HASH_BYTES),) * (SIBLINGS_MAX + 1)))
        with monkeypatch.context() as watched:
            watched.setattr("nexus.proof.evidence.exhibits.leaf_hash", counted)
            watched.setattr("nexus.proof.arithmetic.ops.linear_sums", never)
            for record in (siblings, b"\x82\x5a" + (OPENING_BYTES_MAX + 1).to_bytes(4, "big") + bytes(64)):
                with pytest.raises(MalformedError):
                    OpenedRow.from_bytes(record)
            with pytest.raises(MalformedError):
                Evidence.from_file(b"nexus evidence 1\n" + bytes(EVIDENCE_BYTES_MAX))
            for lie in (
                replace(proof, claim=replace(proof.claim, step=2**20)),
                replace(proof, claim=replace(proof.claim, layer=100)),
                replace(proof, rows=(replace(proof.rows[0], data=proof.rows[0].data * 1000), *proof.rows[1:])),
            ):
                with pytest.raises((MalformedError, VerificationError, NotFoundError)):
                    verify_evidence(Evidence(1, OP, true.accused, lie.to_bytes()))
                assert sum(hashed) <= len(lie.to_bytes())
                hashed.clear()
        for protocol in (AUDIT, EVIDENCE, LEDGER, NODE, INFER, LINK):
            await refuses(arena, protocol, bytes(protocol.first_frame_max or protocol.frame_max))
        assert [await arena.outcome(n) for n in (0, 2, 3, 4)] == [row.outcome] * 4


def raw_record(lie: Proof) -> bytes:
    return lie.to_bytes()


async def refuses(arena: Arena, protocol: ProtocolSpec, frame: bytes) -> None:
    """That a node ends a stream that begins like this, and lives on."""
    stream = await arena.transports[4].open_stream(arena.transports[3].peer_id, protocol)
    with trio.fail_after(10):
        try:
            await stream.send(frame)
            while True:
                await stream.receive()
        except (NexusError, trio.EndOfChannel):
            pass
    assert arena.nodes[3].status().ready


def twisted() -> list[bytes]:
    """Values that a lenient decoder takes for others, or takes for ever."""
    endless: list[object] = []
    endless.append(endless)
    return [
        bytes.fromhex("a2616101616102"),  # one key twice
        bytes.fromhex("a1616101"),  # a map at all
        bytes.fromhex("c11a514b67b0"),  # a tag: a time
        bytes.fromhex("c2420100"),  # a tag: a big number
        bytes.fromhex("d81c81d81d00"),  # a list that holds itself, by shared references
        cbor2.dumps(endless, value_sharing=True),
        bytes.fromhex("1800"),  # 0 in two bytes
        bytes.fromhex("190001"),  # 1 in three
        bytes.fromhex("9f01ff"),  # a list without a length
        bytes.fromhex("5f4101ff"),  # bytes without a length
        bytes.fromhex("f97e00"),  # a number that is none
        bytes.fromhex("f5"),  # true
        bytes.fromhex("0000"),  # something behind it
        bytes.fromhex("62c328"),  # text that is none
        b"\x81" * 5000 + b"\x00",  # deeper than the stack
        b"\x9b" + b"\xff" * 8,  # longer than memory
        b"\x5b" + b"\xff" * 8,
    ]


async def test_cbor_duplicates_tags_and_cycles(tiny: Model, tmp_path: Path, row: Row) -> None:
    """In the decoder, in every record that convicts, and at every door of a node."""
    async with open_arena(tiny, tmp_path) as arena:
        for data in twisted():
            with pytest.raises(MalformedError):
                decode(data)
            with pytest.raises(MalformedError):
                Evidence.from_bytes(data)
            with pytest.raises(NexusError):
                verify_evidence(Evidence(1, OP, arena.key(1), data))
            for protocol in (AUDIT, EVIDENCE, LEDGER, NODE, INFER, LINK):
                await refuses(arena, protocol, data)
        done = await arena.ask()
        assert list(done.bundle.outputs) == arena.right_tokens(done)
        assert [await arena.outcome(n) for n in range(5)] == [row.outcome] * 5


async def test_clock_games(tiny: Model, tmp_path: Path, row: Row) -> None:
    """Receipts and evidence have no times. Where times count, those of others count within bounds only."""
    async with open_arena(tiny, tmp_path, others=6) as arena:
        table, own = arena.nodes[0]._membership._table, arena.nodes[1]._membership.own().record
        peer_id, now_ms = arena.transports[1].peer_id, SYSTEM.now_ms()
        before = table.get(peer_id, now_ms)
        for issued_ms in (now_ms + 3_600_000, 2**52, now_ms - RECORD_LIFETIME_MS - 1000, 0):
            signed = SignedNodeRecord.sign(replace(own, issued_ms=issued_ms), arena.identity(1))
            with pytest.raises(VerificationError):
                table.accept(signed, peer_id, now_ms)
        assert table.get(peer_id, now_ms) == before
        trust = arena.trusts[0]
        terms = (await arena.ask("off", steps=2)).bundle.terms
        for witness in range(2, 6):
            for _ in range(20):
                trust.standings.note_audit(arena.key(witness), True)
        for at_ms in (now_ms + 3_600_000, now_ms - 24 * 3_600_000):
            with pytest.raises(VerificationError):
                trust.standings.suspend(suspension_case(arena, terms, (2, 3, 4), at_ms))
        assert await arena.outcome(1) == row.outcome
