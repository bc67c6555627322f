"""Golden vectors of the shared memory: blocks, batches, charters, sealed blocks, attestations, messages."""

from __future__ import annotations

from nexus.core.keys import Identity
from nexus.memory import collection as rules
from nexus.memory.batch import SignedBatch, sign_batch
from nexus.memory.block import CONTENT, INT8, TOMBSTONE, Block, Vector, block_id, encode_block, id_text
from nexus.memory.bracket import SignedAttestation, receipts
from nexus.memory.collection import SignedCharter
from nexus.memory.sealing import EPOCH_KEY_BYTES, NONCE_BYTES, key_hash, seal
from nexus.node.memory.messages import (
    MESSAGES,
    BlockReceipt,
    Blocks,
    BlocksAsk,
    Collections,
    CollectionsAsk,
    Declined,
    Receipts,
    ReceiptsAsk,
    SearchAsk,
)

TIME_MS = 1_795_000_000_000
OWNER, MEMBER, WITNESS = Identity(b"\x01" * 32), Identity(b"\x02" * 32), Identity(b"\x03" * 32)
EPOCH_KEY, NONCE = bytes(range(EPOCH_KEY_BYTES)), bytes(range(NONCE_BYTES))
VECTOR = Vector("tiny", b"\x07" * 32, INT8, 500_000_000, bytes((127, 127, 127, 127)))


def memory_vectors() -> dict[str, object]:
    public = SignedCharter.sign(rules.create(OWNER.public_key, "notes", rules.PUBLIC, TIME_MS), OWNER)
    private = SignedCharter.sign(
        rules.create(OWNER.public_key, "diary", rules.PRIVATE, TIME_MS, writers=[MEMBER.public_key], key_hash=key_hash(EPOCH_KEY)),
        OWNER,
    )
    first = Block(CONTENT, public.charter.id, OWNER.public_key, TIME_MS, text="The sky is blue.", vectors=(VECTOR,))
    second = first._replace(
        created_ms=TIME_MS + 1,
        expires_ms=TIME_MS + 86_400_000,
        parents=block_id(encode_block(first)),
        after=b"\x09" * 32,
        source=b"\x08" * 32,
        tags=("a", "sky", "ä"),
        title="notes.md > Sky",
        lang="en",
        part=300,
        text="The sky is blue, since air scatters blue light the most. " * 5,
    )
    tombstone = Block(
        TOMBSTONE, public.charter.id, OWNER.public_key, TIME_MS + 2, parents=second.parents + block_id(encode_block(second))
    )
    secret = Block(
        CONTENT, private.charter.id, OWNER.public_key, TIME_MS, title="secret", text="Nobody reads this.", vectors=(VECTOR,)
    )
    sealed = seal(secret, 1, EPOCH_KEY, NONCE)
    encoded = [encode_block(block) for block in (first, second, tombstone)]
    ids = [block_id(data) for data in encoded]
    batch = sign_batch(OWNER, encoded)
    part = SignedBatch(batch.proof.narrow(dict(enumerate(ids)), [1]), (encoded[1],))
    attestation = SignedAttestation.sign(WITNESS, ids, TIME_MS + 60_000, None)
    following = SignedAttestation.sign(WITNESS, ids[:1], TIME_MS + 120_000, attestation.attestation)
    receipt = receipts(attestation, ids)[1].to_bytes()
    messages = {
        "CollectionsAsk": CollectionsAsk("notes", ()),
        "Collections": Collections((public.to_bytes(),), ()),
        "BlocksAsk": BlocksAsk(tuple(ids)),
        "Blocks": Blocks((part.to_bytes(),)),
        "SearchAsk": SearchAsk(
            public.charter.id, 10, VECTOR.fingerprint, VECTOR.scale, VECTOR.codes, "sky", ("a",), (OWNER.public_key,), "en",
            TIME_MS, TIME_MS + 1000, 14_250, 19_340, 100,
        ),
        "ReceiptsAsk": ReceiptsAsk(tuple(ids[:1])),
        "Receipts": Receipts((BlockReceipt(ids[1], receipt),)),
        "Declined": Declined("no such collection is followed here"),
    }  # fmt: skip
    return {
        "blocks": [{"bytes": data.hex(), "id": id_.hex(), "cid": id_text(id_)} for data, id_ in zip(encoded, ids, strict=True)],
        "batch": batch.to_bytes().hex(),
        "part of the batch": part.to_bytes().hex(),
        "charters": [
            {"bytes": signed.to_bytes().hex(), "collection": signed.charter.id.hex(), "digest": signed.charter.digest.hex()}
            for signed in (public, private)
        ],
        "sealed": {
            "bytes": encode_block(sealed).hex(),
            "content": encode_block(secret).hex(),
            "key": EPOCH_KEY.hex(),
            "key hash": key_hash(EPOCH_KEY).hex(),
        },
        "attestations": [
            {"bytes": signed.to_bytes().hex(), "id": signed.attestation.id.hex()} for signed in (attestation, following)
        ],
        "receipt": {"bytes": receipt.hex(), "block": ids[1].hex()},
        "messages": {name: MESSAGES.pack(message).hex() for name, message in messages.items()},
    }
