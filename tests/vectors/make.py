"""Golden vectors: what another implementation must reproduce byte for byte. `python -m tests.vectors.make` writes them anew.

A change of any vector is a change of the protocol: it needs a new spec number, not a new file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from nexus.core.encoding import encode
from nexus.core.hashing import leaf_hash, merkle_proof, merkle_range_proof, merkle_root, tagged_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT, blob_root
from nexus.core.record import Record
from nexus.node.evidence import MESSAGES as EVIDENCE_MESSAGES
from nexus.node.evidence import EvidenceAsk, EvidenceFound, ListAsk, Listed, ListPage
from nexus.node.infer.messages import (
    INFER_MESSAGES,
    LINK_MESSAGES,
    Accepted,
    Failed,
    FeedInput,
    Finish,
    Hello,
    KnownPeer,
    Open,
    Output,
    OwnReceipt,
    OwnTrace,
    Push,
)
from nexus.node.ledger import MESSAGES as LEDGER_MESSAGES
from nexus.node.ledger import ChainAsk, ChainPage, Declined, Earned, Head, HeadAsk, PageItem, Pay
from nexus.proof.accounts import EARN, PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.arithmetic.sampler import Sampling, sample_exact
from nexus.proof.arithmetic.tables import exp_tables
from nexus.proof.evidence import FORK, Evidence
from nexus.proof.receipts import Refusal, SignedRefusal, millionths
from nexus.proof.trace import WindowTrace
from nexus.swarm.fragments import Publication, SignedPublication
from nexus.swarm.links import Coordinate
from nexus.swarm.membership import Holding, LayerRange, NodeRecord, SignedNodeRecord
from tests.swarm.ring import causal_ring, encoder_ring, identity, shapes_for
from tests.vectors.arithmetic import arithmetic_vectors
from tests.vectors.make_memory import memory_vectors

DIRECTORY = Path(__file__).parent

VALUES: list[tuple[str, object]] = [
    ("zero", 0),
    ("23", 23),
    ("24", 24),
    ("255", 255),
    ("256", 256),
    ("65536", 65536),
    ("2^32", 2**32),
    ("2^64-1", 2**64 - 1),
    ("-1", -1),
    ("-2^64", -(2**64)),
    ("empty bytes", b""),
    ("24 bytes", bytes(range(24))),
    ("text", "Nexus ✓"),
    ("empty array", ()),
    ("nested", (1, (b"\x02", ("three", ())))),
]


def _record(record: Record, **more: str) -> dict[str, str]:
    return {"bytes": record.to_bytes().hex(), **more}


def core_vectors() -> dict[str, object]:
    leaves = [leaf_hash(bytes([n])) for n in range(7)]
    alice = Identity(bytes(range(32)))
    return {
        "encoding": {name: encode(value).hex() for name, value in VALUES},  # type: ignore[arg-type]
        "not encodings": ["1801", "190017", "0000", "a0", "f4", "f6", "f90000", "9f01ff", "62fffe", "5801", "c000"],
        "tagged_hash": {
            "no parts": tagged_hash("test").hex(),
            "one empty part": tagged_hash("test", b"").hex(),
            "two parts": tagged_hash("test", b"ab", b"c").hex(),
        },
        "merkle": {
            "leaf of 'x'": leaf_hash(b"x").hex(),
            "root of no leaves": merkle_root([]).hex(),
            "root of leaves 00..06": merkle_root(leaves).hex(),
            "proof of leaf 5": [sibling.hex() for sibling in merkle_proof(leaves, 5)],
            "proof of leaves 2 to 5": [sibling.hex() for sibling in merkle_range_proof(leaves, 2, 5)],
        },
        "blob": {
            "root of 3 MiB - 1 zero bytes": _zero_blob(3 * 2**20 - 1),
            "root of no bytes": blob_root(0, [leaf_hash(b"")]).hex(),
        },
        "identity": {
            "seed": alice.seed.hex(),
            "public_key": alice.public_key.hex(),
            "peer_id": alice.peer_id,
            "signature under tag 'test' of 'hello'": alice.sign("test", b"hello").hex(),
        },
    }


def _zero_blob(size: int) -> str:
    chunks = [min(2**20, size - at) for at in range(0, size, 2**20)]
    return blob_root(size, [leaf_hash(bytes(length)) for length in chunks]).hex()


def session_vectors() -> dict[str, object]:
    """A whole session of two stages and 18 steps, so that there is a full window and a short one."""
    ring = causal_ring(2, 18)
    bundle = ring.run()
    encoder = encoder_ring(2, 3).run()
    exact_ring = causal_ring(2, 18, profile=EXACT)
    exact = exact_ring.run()
    assert bundle is not None
    assert exact is not None
    assert encoder is not None
    terms, plan = bundle.terms, bundle.plan
    return {
        "seeds": {"coordinator": identity(0).seed.hex(), "stage 0": identity(1).seed.hex(), "stage 1": identity(2).seed.hex()},
        "manifest": _record(bundle.manifest, root=bundle.manifest.root.hex()),
        "plan": _record(plan, root=plan.root.hex()),
        "terms": _record(terms, session=terms.session.hex()),
        "requests": [_record(signed, id=signed.request.id.hex()) for signed in bundle.requests],
        "receipts": [_record(signed, id=signed.receipt.id.hex()) for signed in bundle.receipts],
        "bundle": bundle.to_bytes().hex(),
        "encoder bundle": encoder.to_bytes().hex(),
        "exact": {
            "bundle": exact.to_bytes().hex(),
            "shapes": [
                {"layers": shape.layers, "kv_heads": shape.kv_heads, "logits": shape.logits}
                for shape in shapes_for(exact_ring.model, exact_ring.plan)
            ],
            "traces": [[trace.to_bytes().hex() for trace in traces] for traces in exact_ring.traces],
        },
    }


def wire_vectors() -> dict[str, object]:
    bundle = causal_ring(2, 18).run()
    assert bundle is not None
    following = KnownPeer(identity(2).public_key, ("/ip4/192.0.2.7/tcp/4510",))
    refusal = SignedRefusal.sign(
        Refusal(bundle.terms.session, identity(1).public_key, 0, 3, "capacity", "the cache is full", "Wait"), identity(1)
    )
    root = bundle.manifest.root
    published = SignedPublication.sign(Publication(identity(2).public_key, "toy", 2, root), identity(2))
    version = (2, identity(2).public_key, published.signature)
    holding = Holding("toy", root, (LayerRange(0, 4),), (LayerRange(1, 3),), *version, 2**30, 2**31)
    record = NodeRecord(
        spec=1,
        node=identity(1).public_key,
        issued_ms=1_700_000_000_000,
        agent="nexus/0.1.0",
        name="attic",
        addresses=("/ip4/192.0.2.7/tcp/4510",),
        memory_bytes=8 << 30,
        memory_free_bytes=7 << 30,
        exact_speed=50_000,
        float_speed=20_000,
        upload=12_500_000,
        load=3,
        coordinate=Coordinate(12_000, -3_500, 0, 800, 150_000),
        serves=1,
        leaving=0,
        models=(holding,),
        price=7,
    )
    return {
        "/nexus/infer/1": {
            "Open": INFER_MESSAGES.pack(Open(0, "toy", bundle.plan, bundle.terms, bundle.requests[0], following, ())).hex(),
            "Accepted": INFER_MESSAGES.pack(Accepted()).hex(),
            "FeedInput": INFER_MESSAGES.pack(FeedInput(0, bundle.inputs[0])).hex(),
            "Finish": INFER_MESSAGES.pack(Finish()).hex(),
            "Output": INFER_MESSAGES.pack(Output(0, bundle.outputs[0])).hex(),
            "OwnTrace": INFER_MESSAGES.pack(OwnTrace(WindowTrace(bytes(range(160)), bytes(range(64))))).hex(),
            "Failed": INFER_MESSAGES.pack(Failed(refusal)).hex(),
        },
        "/nexus/link/1": {
            "Hello": LINK_MESSAGES.pack(Hello(bundle.terms.session, 1)).hex(),
            "Push": LINK_MESSAGES.pack(Push(15, bytes(16))).hex(),
            "OwnReceipt": LINK_MESSAGES.pack(OwnReceipt(bundle.receipts[0])).hex(),
            "Finish": LINK_MESSAGES.pack(Finish()).hex(),
        },
        "node record": _record(SignedNodeRecord.sign(record, identity(1))),
    }


SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(1.0, seed=1),
    Sampling(0.7, seed=2**64 - 1, top_k=40),
    Sampling(1.3, 0.9, 3),
    Sampling(1.0, seed=4, min_p=0.05),
    Sampling(0.8, 0.95, 7, 40, 0.05, 1.1),
    Sampling(100.0, seed=5),
]


def sampling_vectors() -> dict[str, object]:
    """The exact profile's choice from 512 logits, with equal ones among them, at 16 steps, each penalised for those before."""
    logits = ((np.arange(512, dtype=np.float32) * np.float32(0.37)) % np.float32(11)).round(1)
    tables = exp_tables()
    cases = []
    for sampling in SAMPLINGS:
        tokens: list[int] = []
        for step in range(16):
            tokens.append(sample_exact(logits, sampling, step, tables, tokens))
        options = {name: millionths(getattr(sampling, name)) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        cases.append(options | {"top_k": sampling.top_k, "seed": sampling.seed, "tokens": tokens})
    return {
        "exp_hi, as leaf hash of 256 float64": leaf_hash(tables[0].astype("<f8").tobytes()).hex(),
        "exp_lo, as leaf hash of 4096 float64": leaf_hash(tables[1].astype("<f8").tobytes()).hex(),
        "logits, float32": logits.astype("<f4").tobytes().hex(),
        "cases": cases,
    }


def ledger_vectors() -> dict[str, object]:
    """A payment and two earnings, a fork of the payer's account, and the messages that carry them."""
    payer, one, two = identity(1), identity(2), identity(3)
    shares = (Share(one.public_key, 90), Share(two.public_key, 45))
    pay = SignedEntry.sign(Entry(1, payer.public_key, 0, b"", PAY, leaf_hash(b"session"), 151, shares, b""), payer)
    earned = [
        SignedEntry.sign(
            Entry(1, node.public_key, 0, b"", EARN, pay.entry.session, pay.entry.share_of(node.public_key), (), pay.entry.id), node
        )
        for node in (one, two)
    ]
    other = SignedEntry.sign(replace(pay.entry, session=leaf_hash(b"another")), payer)
    evidence = Evidence(1, FORK, payer.public_key, Fork.of(pay, other).to_bytes())
    listed = Listed(payer.public_key, evidence.id)
    for signed in (pay, *earned, other):
        signed.verify()
    return {
        "entries": [_record(signed, id=signed.entry.id.hex()) for signed in (pay, *earned)],
        "fork": {"file": evidence.to_file().hex(), "id": evidence.id.hex(), "accused": evidence.peer_id},
        "/nexus/ledger/1": {
            "Pay": LEDGER_MESSAGES.pack(Pay(pay)).hex(),
            "Earned": LEDGER_MESSAGES.pack(Earned(earned[0])).hex(),
            "Declined": LEDGER_MESSAGES.pack(Declined("nothing is taken from a convicted node")).hex(),
            "HeadAsk": LEDGER_MESSAGES.pack(HeadAsk(payer.public_key)).hex(),
            "Head": LEDGER_MESSAGES.pack(Head((pay,))).hex(),
            "ChainAsk": LEDGER_MESSAGES.pack(ChainAsk(0)).hex(),
            "ChainPage": LEDGER_MESSAGES.pack(ChainPage((PageItem(earned[0], (pay,)),), 1)).hex(),
        },
        "/nexus/evidence/1": {
            "ListAsk": EVIDENCE_MESSAGES.pack(ListAsk(b"")).hex(),
            "ListPage": EVIDENCE_MESSAGES.pack(ListPage((listed,), 0)).hex(),
            "EvidenceAsk": EVIDENCE_MESSAGES.pack(EvidenceAsk(evidence.id)).hex(),
            "EvidenceFound": EVIDENCE_MESSAGES.pack(EvidenceFound(evidence.to_bytes())).hex(),
        },
        "gossip nexus/evidence/1": listed.to_bytes().hex(),
    }


FILES = {
    "arithmetic.json": arithmetic_vectors,
    "core.json": core_vectors,
    "ledger.json": ledger_vectors,
    "memory.json": memory_vectors,
    "sampling.json": sampling_vectors,
    "session.json": session_vectors,
    "wire.json": wire_vectors,
}


def text_of(name: str) -> str:
    return json.dumps(FILES[name](), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in FILES:
        (DIRECTORY / file).write_text(text_of(file), encoding="utf-8")
