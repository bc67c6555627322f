"""The collections that this node has or follows: their charters, the keys of private ones, and what it is subscribed to.

All of it is kept in the memory store. A charter of somebody else is kept while the collection is followed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

import structlog

from nexus.core.errors import CapacityError, NotAllowedError, NotFoundError, PeerError, UsageError, VerificationError
from nexus.core.keys import Identity, peer_id_of
from nexus.memory import collection as rules
from nexus.memory.collection import Charter, SignedCharter
from nexus.memory.sealing import EPOCH_KEY_BYTES, SignedKeyGrant, deliver, key_hash, receive
from nexus.node.environment import Environment
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.charters")

FOLLOWED_MAX = 256
NOTED_MAX = 256
_CHARTER, _FOLLOWED, _KEY, _GRANT = "charter", "followed", "epoch-key", "key-grant"


class Charters:
    """Methods raise LocalError where the disk stands in the way. Any thread: changes go one at a time."""

    def __init__(self, store: MemoryStore, identity: Identity, environment: Environment) -> None:
        self._store = store
        self._identity = identity
        self._now_ms = environment.now_ms
        self._rng = environment.rng
        self._changing = threading.RLock()
        self._signed: dict[bytes, SignedCharter] = {}
        self._charters: dict[bytes, Charter] = {}
        # Of collections that a user looked into without following them: forgotten with time.
        self._noted: OrderedDict[bytes, SignedCharter] = OrderedDict()
        self._followed: set[bytes] = set()
        self._keys: dict[bytes, dict[int, bytes]] = {}
        self._grants: dict[bytes, dict[tuple[int, bytes], bytes]] = {}

    def load(self) -> None:
        """What is damaged is left out: charters and keys of others come again from peers."""
        for data in self._store.sound_documents(_CHARTER).values():
            try:
                signed = SignedCharter.from_bytes(data)
                signed.verify()
            except PeerError as error:
                log.error("charter_left_out", reason=error.cause)
                continue
            self._signed[signed.charter.id] = signed
            self._charters[signed.charter.id] = signed.charter
        self._followed = set(self._store.sound_documents(_FOLLOWED))
        for key, data in self._store.sound_documents(_KEY).items():
            self._keys.setdefault(key[:32], {})[int.from_bytes(key[32:], "big")] = data
        for key, data in self._store.sound_documents(_GRANT).items():
            self._grants.setdefault(key[:32], {})[int.from_bytes(key[32:36], "big"), key[36:]] = data

    # --- what there is -----------------------------------------------------------------------------------------------------------

    def find(self, collection: bytes) -> Charter | None:
        noted = self._noted.get(collection)
        return self._charters.get(collection) or (noted.charter if noted is not None else None)

    def of(self, collection: bytes) -> Charter:
        """Raises NotFoundError."""
        charter = self._charters.get(collection)
        if charter is None:
            raise NotFoundError(
                f"no collection {collection.hex()[:16]} is known here", "`nexus collection ls` lists those that are"
            )
        return charter

    def all(self) -> list[Charter]:
        """Sorted by name, then by owner."""
        return sorted(self._charters.values(), key=lambda charter: (charter.name, charter.owner))

    def signed(self, collection: bytes) -> SignedCharter | None:
        return self._signed.get(collection)

    def follows(self, collection: bytes) -> bool:
        return collection in self._followed

    def followed(self) -> list[bytes]:
        return sorted(self._followed)

    def name(self, collection: bytes) -> str:
        """As users write it: with the owner where another one has the same name."""
        charter = self.find(collection)
        if charter is None:
            return collection.hex()[:16]
        alone = not any(other.name == charter.name and other.id != charter.id for other in list(self._charters.values()))
        return charter.name if alone else f"{charter.name}@{peer_id_of(charter.owner)}"

    def resolve(self, reference: str) -> Charter:
        """The collection that a user means by NAME or NAME@PEER, an own one before others'. Raises NotFoundError, UsageError."""
        name, peer = rules.split_reference(reference)
        fits = [charter for charter in self.all() if charter.name == name and _owned_by(charter, peer)]
        own = [charter for charter in fits if charter.owner == self._identity.public_key]
        if not peer and own:
            return own[0]
        if len(fits) > 1:
            shown = ", ".join(self.name(charter.id) for charter in fits[:4])
            raise UsageError(f"{reference!r} fits {len(fits)} collections", f"Say whose: {shown}")
        if not fits:
            raise NotFoundError(
                f"no collection {reference!r} is known here",
                f"Make it with: nexus collection create {name}, or follow it with: subscribe",
            )
        return fits[0]

    # --- changes -----------------------------------------------------------------------------------------------------------------

    def create(self, name: str, mode: int, others: Sequence[bytes], model: str, fingerprint: bytes) -> Charter:
        """A new collection of this node, followed from now on. `others`: who may write too. Raises UsageError."""
        with self._changing:
            return self._create(name, mode, others, model, fingerprint)

    def _create(self, name: str, mode: int, others: Sequence[bytes], model: str, fingerprint: bytes) -> Charter:
        owner = self._identity.public_key
        if rules.collection_id(owner, name) in self._charters:
            raise UsageError(
                f"you have a collection {name!r} already", "Choose another name, or change that one: nexus collection grant"
            )
        key = self._rng.randbytes(EPOCH_KEY_BYTES) if mode == rules.PRIVATE else b""
        charter = rules.create(
            owner,
            name,
            mode,
            self._now_ms(),
            writers=others,
            key_hash=key_hash(key) if key else b"",
            model=model,
            fingerprint=fingerprint,
        )
        self._check_room(charter.id)
        if key:
            self._keep_key(charter, key)
        self._keep(SignedCharter.sign(charter, self._identity))
        self.follow(charter.id)
        return charter

    def grant(self, charter: Charter, peer: bytes, *, write: bool) -> Charter:
        """Raises NotAllowedError for another owner's collection, UsageError, CapacityError."""
        self._check_own(charter)
        with self._changing:
            # As it is by now: another change of it may have come before.
            charter = self.of(charter.id)
            changed = rules.grant(charter, peer, write=write, issued_ms=self._now_ms())
            if charter.mode == rules.PRIVATE:
                for epoch, key in sorted(self.keys(charter.id).items()):
                    self._keep_grant(charter, epoch, peer, key)
            self._keep(SignedCharter.sign(changed, self._identity))
            return changed

    def revoke(self, charter: Charter, peer: bytes, *, may_still_read: bool) -> Charter:
        """Raises as `grant` does, and NotFoundError for one who had no such right."""
        self._check_own(charter)
        with self._changing:
            return self._revoke(self.of(charter.id), peer, may_still_read)

    def _revoke(self, charter: Charter, peer: bytes, may_still_read: bool) -> Charter:
        rotate = charter.mode == rules.PRIVATE and not may_still_read and peer in charter.readers()
        key = self._rng.randbytes(EPOCH_KEY_BYTES) if rotate else b""
        changed = rules.revoke(
            charter,
            peer,
            issued_ms=self._now_ms(),
            may_still_read=may_still_read,
            key_hash=key_hash(key) if key else b"",
        )
        if key:
            self._keep_key(changed, key)
        self._keep(SignedCharter.sign(changed, self._identity))
        return changed

    def take(self, signed: SignedCharter) -> bool:
        """A charter from elsewhere; whether it is news. Raises MalformedError, VerificationError."""
        charter = signed.verify()
        with self._changing:
            known = self._signed.get(charter.id)
            if known is not None and rules.newest(known, signed) is known:
                return False
            self._keep(signed)
            return True

    def note(self, charters: Iterable[bytes], ids: Collection[bytes]) -> None:
        """Charters of collections that are looked into and not followed. Raises MalformedError, VerificationError."""
        for signed in read_charters(charters, "", ids):
            # Whoever is asked may have an older one.
            self._noted[signed.charter.id] = rules.newest(self._noted.get(signed.charter.id, signed), signed)
            self._noted.move_to_end(signed.charter.id)
        while len(self._noted) > NOTED_MAX:
            self._noted.popitem(last=False)

    def take_grant(self, data: bytes) -> bool:
        """A key of a private collection, sealed to this node; whether it is news. Raises MalformedError, VerificationError."""
        signed = SignedKeyGrant.from_bytes(data)
        grant = signed.grant
        with self._changing:
            charter = self._charters.get(grant.collection)
            if charter is None or grant.epoch in self.keys(grant.collection):
                return False
            key = receive(signed, charter, self._identity)
            self._store.put_document(_KEY, grant.collection + grant.epoch.to_bytes(4, "big"), key)
            self._keys.setdefault(grant.collection, {})[grant.epoch] = key
            return True

    def follow(self, collection: bytes) -> None:
        """Raises CapacityError."""
        with self._changing:
            self._check_room(collection)
            self._store.put_document(_FOLLOWED, collection, b"")
            self._followed.add(collection)

    def unfollow(self, collection: bytes) -> None:
        with self._changing:
            self._store.remove_document(_FOLLOWED, collection)
            self._followed.discard(collection)

    def _check_room(self, collection: bytes) -> None:
        if collection not in self._followed and len(self._followed) >= FOLLOWED_MAX:
            raise CapacityError(f"this node follows {FOLLOWED_MAX} collections, all that it can", "Give one up: unsubscribe")

    def _check_own(self, charter: Charter) -> None:
        if charter.owner != self._identity.public_key:
            raise NotAllowedError(
                f"{charter.name!r} belongs to {peer_id_of(charter.owner)}", "Only the owner of a collection can change who is in it"
            )

    # --- keys --------------------------------------------------------------------------------------------------------------------

    def keys(self, collection: bytes) -> dict[int, bytes]:
        """The keys that this node has for a private collection, by epoch."""
        return self._keys.get(collection, {})

    def grants_for(self, collection: bytes, member: bytes) -> list[bytes]:
        """What an owner hands to a member, oldest key first; empty unless this node is the owner."""
        return [data for (_, to), data in sorted(self._grants.get(collection, {}).items()) if to == member]

    def _keep_key(self, charter: Charter, key: bytes) -> None:
        """A new key of an own collection, for this node and sealed to every reader."""
        self._store.put_document(_KEY, charter.id + charter.epoch.to_bytes(4, "big"), key)
        self._keys.setdefault(charter.id, {})[charter.epoch] = key
        for reader in charter.readers():
            if reader != self._identity.public_key:
                self._keep_grant(charter, charter.epoch, reader, key)

    def _keep_grant(self, charter: Charter, epoch: int, member: bytes, key: bytes) -> None:
        data = deliver(charter.id, epoch, member, key, self._identity).to_bytes()
        self._store.put_document(_GRANT, charter.id + epoch.to_bytes(4, "big") + member, data)
        self._grants.setdefault(charter.id, {})[epoch, member] = data

    def _keep(self, signed: SignedCharter) -> None:
        self._store.put_document(_CHARTER, signed.charter.id, signed.to_bytes())
        self._signed[signed.charter.id] = signed
        self._charters[signed.charter.id] = signed.charter


def read_charters(listed: Iterable[bytes], name: str, ids: Collection[bytes]) -> list[SignedCharter]:
    """The charters in a peer's answer. Raises MalformedError, VerificationError, also for one that was not asked for."""
    found: dict[bytes, SignedCharter] = {}
    for data in listed:
        signed = SignedCharter.from_bytes(data)
        charter = signed.verify()
        if (charter.name != name if name else charter.id not in ids) or charter.id in found:
            raise VerificationError("the peer sent a charter that it was not asked for")
        found[charter.id] = signed
    return list(found.values())


def _owned_by(charter: Charter, peer: str) -> bool:
    return peer_id_of(charter.owner).startswith(peer)
