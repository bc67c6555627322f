"""Domain-tagged BLAKE3 and Merkle trees (RFC 6962, section 2.1, with BLAKE3 for SHA-256)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from blake3 import blake3

from nexus.core.errors import VerificationError

HASH_BYTES = 32
MAX_PROOF_HASHES = 64
# From this length on a second call costs less than a copy.
_COPY_NO_MORE = 16 * 1024


def tagged_hash(tag: str, *parts: bytes) -> bytes:
    """H(tag, parts...) = BLAKE3("nexus/v1/" tag 0x00, then for each part its length as 8 bytes little-endian and the part)."""
    hasher = blake3(b"nexus/v1/" + tag.encode("ascii") + b"\0")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def leaf_hash(data: bytes) -> bytes:
    """The hash of one Merkle leaf: BLAKE3(0x00 data)."""
    if len(data) >= _COPY_NO_MORE:
        return blake3(b"\0").update(data).digest()
    return blake3(b"\0" + data).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return blake3(b"\1" + left + right).digest()


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes, in order. The root of no leaves is BLAKE3 of nothing. Sign the tree size beside the root."""
    level = list(leaves)
    if not level:
        return blake3(b"").digest()
    # Pairing neighbours and carrying an odd last one up gives the same tree as RFC 6962's split at a power of two.
    while len(level) > 1:
        paired = [_node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)


def merkle_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Sibling hashes from leaf `index` up to the root (RFC 6962, section 2.1.1)."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*merkle_proof(leaves[:k], index), merkle_root(leaves[k:])]
    return [*merkle_proof(leaves[k:], index - k), merkle_root(leaves[:k])]


def verify_merkle_proof(root: bytes, size: int, index: int, leaf: bytes, proof: Sequence[bytes]) -> None:
    """Check that `leaf` (a leaf hash) is number `index` of the `size` leaves under `root`. Raises VerificationError."""
    if not 0 <= index < size or len(proof) > MAX_PROOF_HASHES:
        raise VerificationError("the Merkle proof does not fit its tree")
    sides = sibling_sides(size, index)
    if len(sides) != len(proof):
        raise VerificationError("the Merkle proof has the wrong length")
    node = leaf
    for left, sibling in zip(sides, proof, strict=True):
        node = _node_hash(sibling, node) if left else _node_hash(node, sibling)
    if node != root:
        raise VerificationError("the Merkle proof does not lead to the root")


def sibling_sides(size: int, index: int) -> list[bool]:
    """Of the siblings of leaf `index` of `size`, from the leaf up: whether each is on the left."""
    # Walk down from the root, so that the side of every sibling follows from index and size alone.
    lefts = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        lefts.append(index >= middle)
        low, high = (middle, high) if index >= middle else (low, middle)
    return lefts[::-1]


def merkle_range_proof(leaves: Sequence[bytes], start: int, end: int) -> list[bytes]:
    """The roots of the largest subtrees without a leaf of [start, end), from left to right: what `verify_merkle_range` needs."""
    if not 0 <= start < end <= len(leaves):
        raise IndexError(f"leaves {start} to {end} of {len(leaves)}")
    return [merkle_root(leaves[low:high]) for low, high in _outside(0, len(leaves), start, end)]


def verify_merkle_range(root: bytes, size: int, start: int, leaves: Sequence[bytes], proof: Sequence[bytes]) -> None:
    """Check that `leaves` (leaf hashes) are those from number `start` on of the `size` under `root`. Raises VerificationError.

    Takes a hash per leaf and two per level of the tree. A proof of another length than the range asks for is refused first.
    """
    if merkle_range_root(size, start, leaves, proof) != root:
        raise VerificationError("the Merkle range proof does not lead to the root")


def merkle_range_root(size: int, start: int, leaves: Sequence[bytes], proof: Sequence[bytes]) -> bytes:
    """The root that a range proof leads to. Raises VerificationError for a proof of another length than the range asks for."""
    end = start + len(leaves)
    if not 0 <= start < end <= size < 1 << MAX_PROOF_HASHES:
        raise VerificationError(f"leaves {start} to {end} are no range of a tree of {size}")
    if len(proof) != len(_outside(0, size, start, end)):
        raise VerificationError("the Merkle range proof has the wrong length")
    return _range_root(0, size, start, leaves, iter(proof))


def _outside(low: int, high: int, start: int, end: int) -> list[tuple[int, int]]:
    """The largest subtrees of the tree over [low, high) that have no leaf of [start, end). At most two per level."""
    if end <= low or high <= start:
        return [(low, high)]
    if start <= low and high <= end:
        return []
    middle = low + _split(high - low)
    return _outside(low, middle, start, end) + _outside(middle, high, start, end)


def _range_root(low: int, high: int, start: int, leaves: Sequence[bytes], outside: Iterator[bytes]) -> bytes:
    """The root over [low, high), from the leaves from `start` on and the roots of the subtrees without any of them."""
    end = start + len(leaves)
    if end <= low or high <= start:
        return next(outside)
    if start <= low and high <= end:
        return merkle_root(leaves[low - start : high - start])
    middle = low + _split(high - low)
    left = _range_root(low, middle, start, leaves, outside)
    return _node_hash(left, _range_root(middle, high, start, leaves, outside))


def merkle_joint_proof(leaves: Sequence[bytes], indices: Collection[int]) -> list[bytes]:
    """The roots of the largest subtrees without any of these leaves, from left to right: what `merkle_joint_root` needs."""
    if not indices or min(indices) < 0 or max(indices) >= len(leaves):
        raise IndexError(f"leaves {sorted(indices)} of {len(leaves)}")
    return [merkle_root(leaves[low:high]) for low, high in _beside(0, len(leaves), frozenset(indices))]


def merkle_joint_root(
    size: int, leaves: Mapping[int, bytes], proof: Sequence[bytes], nodes: dict[tuple[int, int], bytes] | None = None
) -> bytes:
    """The root that a proof of several leaves (leaf hashes by index) of `size` leads to. Raises VerificationError.

    `nodes`: takes the root over every span [low, high) that was met on the way.
    """
    if not leaves or not 0 <= min(leaves) <= max(leaves) < size < 1 << MAX_PROOF_HASHES:
        raise VerificationError("the leaves are none of the tree")
    if len(proof) != len(_beside(0, size, frozenset(leaves))):
        raise VerificationError("the Merkle proof has the wrong length")
    return _joint_root(0, size, leaves, iter(proof), nodes)


def merkle_joint_narrow(size: int, leaves: Mapping[int, bytes], proof: Sequence[bytes], wanted: Collection[int]) -> list[bytes]:
    """From a proof of several leaves the one of some of them, `wanted`. Raises VerificationError as `merkle_joint_root` does."""
    if not wanted or not leaves.keys() >= set(wanted):
        raise VerificationError("the wanted leaves are not among those proven")
    nodes: dict[tuple[int, int], bytes] = {}
    merkle_joint_root(size, leaves, proof, nodes)
    return [nodes[span] for span in _beside(0, size, frozenset(wanted))]


def _beside(low: int, high: int, indices: frozenset[int]) -> list[tuple[int, int]]:
    """The largest subtrees of the tree over [low, high) that have none of these leaves."""
    if not indices:
        return [(low, high)]
    if high - low == 1:
        return []
    middle = low + _split(high - low)
    left = frozenset(index for index in indices if index < middle)
    return _beside(low, middle, left) + _beside(middle, high, indices - left)


def _joint_root(
    low: int, high: int, leaves: Mapping[int, bytes], beside: Iterator[bytes], nodes: dict[tuple[int, int], bytes] | None
) -> bytes:
    if not leaves:
        root = next(beside)
    elif high - low == 1:
        root = leaves[low]
    else:
        middle = low + _split(high - low)
        under = {index: leaf for index, leaf in leaves.items() if index < middle}
        left = _joint_root(low, middle, under, beside, nodes)
        over = {index: leaf for index, leaf in leaves.items() if index >= middle}
        root = _node_hash(left, _joint_root(middle, high, over, beside, nodes))
    if nodes is not None:
        nodes[low, high] = root
    return root


def merkle_peaks(leaves: Sequence[bytes]) -> list[bytes]:
    """The roots of the largest complete subtrees, from left to right: all that is needed of a tree to append to it."""
    return [merkle_root(leaves[low:high]) for low, high in _complete(len(leaves))]


def appended_roots(size: int, peaks: Sequence[bytes], leaves: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The roots of the tree of `size` leaves that has these peaks, and of it with `leaves` (leaf hashes) appended.

    Raises VerificationError for another number of peaks than such a tree has.
    """
    if not 0 <= size < 1 << MAX_PROOF_HASHES or len(peaks) != size.bit_count():
        raise VerificationError("the peaks are not those of a tree of this size")
    if not peaks:
        return merkle_root(()), merkle_root(leaves)
    before = peaks[-1]
    for peak in reversed(peaks[:-1]):
        before = _node_hash(peak, before)
    if not leaves:
        return before, before
    return before, _range_root(0, size + len(leaves), size, leaves, iter(peaks))


def _complete(size: int) -> list[tuple[int, int]]:
    """The largest complete subtrees of a tree of `size` leaves: one per bit of the size."""
    spans, low = [], 0
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            spans.append((low, low + (1 << bit)))
            low += 1 << bit
    return spans


class MerkleTree:
    """Every node of a tree over leaf hashes, where many proofs of it are wanted."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        """`leaves`: at least one."""
        # levels[k][i] is the root over leaves [i << k, (i + 1) << k), as far as there are so many.
        self._levels = [list(leaves)]
        while len(level := self._levels[-1]) > 1:
            paired = [_node_hash(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            self._levels.append([*paired, level[-1]] if len(level) % 2 else paired)

    @property
    def size(self) -> int:
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def range_proof(self, start: int, end: int) -> list[bytes]:
        """As `merkle_range_proof`, in time with the depth of the tree."""
        if not 0 <= start < end <= self.size:
            raise IndexError(f"leaves {start} to {end} of {self.size}")
        return [
            self._levels[(high - low - 1).bit_length()][low >> (high - low - 1).bit_length()]
            for low, high in _outside(0, self.size, start, end)
        ]
