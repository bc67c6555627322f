"""Weight rows that a verdict works with: out of the proof, or the verifier's own, always under the root of the accused's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, NexusError, NotFoundError, VerificationError
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import (
    TABLES,
    LinearRows,
    RowLayout,
    Section,
    WeightProof,
    check_weight_rows,
    float_rows,
    linear_rows,
    piece_names,
    row_layout,
    table_rows,
)
from nexus.proof.evidence.case import CheckedCase
from nexus.proof.evidence.exhibits import LEAVES_MAX

# Rows of a linear part are worked on in blocks of about so many bytes.
_BLOCK_BYTES = 8 << 20

Array = NDArray[np.float32]


class WeightSource(Protocol):
    """Weight rows of models that the verifier has itself."""

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        """Leaves [start, start + count) of a piece's tree of rows, proven. Raises NotFoundError where the model is not here."""
        ...


class Weights:
    """The rows of a case's model that the accused's stage works with; others are refused."""

    def __init__(self, case: CheckedCase, proofs: Sequence[WeightProof], source: WeightSource | None) -> None:
        self._model = case.model
        self._plan: ExactPlan = case.exact
        self._source = source
        names = piece_names(case.exact)
        self._numbers = {name: number for number, name in enumerate(names)}
        # A stage answers for the pieces that it loads: of others it never saw whether their rows are under the root.
        self._loaded = {TABLES, *(layer_name(index) for index in range(case.start, case.end))}
        if case.first or (case.last and case.exact.tied):
            self._loaded.add(EMBEDDING)
        if case.last:
            self._loaded.add(HEAD)
        self._layouts: dict[str, RowLayout] = {}
        self._shown: dict[tuple[int, int], bytes] = {}
        if sum(proof.count for proof in proofs) > LEAVES_MAX:
            raise MalformedError(f"a proof shows at most {LEAVES_MAX} weight rows")
        for proof in proofs:
            for index, leaf in enumerate(self._checked(proof), proof.index):
                self._shown[proof.piece, index] = leaf

    def section(self, piece: str, name: str) -> Section:
        if piece not in self._layouts:
            self._layouts[piece] = row_layout(self._plan, piece)
        return self._layouts[piece].section(name)

    def linear(self, piece: str, name: str, start: int, count: int) -> Iterator[tuple[int, LinearRows]]:
        """Rows [start, start + count) of a linear part, block by block: (first row, rows)."""
        section = self.section(piece, name)
        step = max(1, _BLOCK_BYTES // section.leaf_bytes)
        for at in range(start, start + count, step):
            yield at, linear_rows(section, self._leaves(piece, section, at, min(step, start + count - at)))

    def vector(self, piece: str, name: str) -> Array:
        """A tensor of one dimension."""
        section = self.section(piece, name)
        values: Array = float_rows(section, self._leaves(piece, section, 0, 1))[0]
        return values

    def row(self, piece: str, name: str, index: int) -> Array:
        """One row of a float tensor of two dimensions."""
        section = self.section(piece, name)
        values: Array = float_rows(section, self._leaves(piece, section, index, 1))[0]
        return values

    def table(self, name: str, indices: Sequence[int]) -> NDArray[np.float64]:
        """Rows of a table of rotary angles: [n, rotated / 2, 2]."""
        section = self.section(TABLES, name)
        known = {index: self._leaves(TABLES, section, index, 1)[0] for index in set(indices)}
        return table_rows(section, [known[index] for index in indices])

    def _leaves(self, piece: str, section: Section, start: int, count: int) -> list[bytes]:
        if piece not in self._loaded:
            raise VerificationError(f"the accused's stage does not work with {piece}")
        if not 0 <= start < start + count <= section.count:
            raise VerificationError(f"{section.name} of {piece} has no rows {start} to {start + count}")
        number, first = self._numbers[piece], section.first + start
        shown = [self._shown.get((number, index)) for index in range(first, first + count)]
        found = [leaf for leaf in shown if leaf is not None]
        return found if len(found) == count else self._own(number, first, count)

    def _own(self, piece: int, first: int, count: int) -> list[bytes]:
        if self._source is None:
            raise self.missing()
        try:
            proof = self._source.range(self._model.root, piece, first, count)
            if (proof.piece, proof.index, proof.count) != (piece, first, count):
                raise VerificationError("other weights were found than were asked for")
            # Damage on the verifier's own disk must convict nobody.
            return self._checked(proof)
        except NotFoundError:
            raise
        except NexusError as error:
            # Nor is it the fault of whoever brought the proof.
            raise NotFoundError(f"this node's own weights cannot be used: {error.cause}", "Fetch the model again") from error

    def _checked(self, proof: WeightProof) -> list[bytes]:
        root = self._model.rows.get(proof.piece)
        if root is None:
            raise MalformedError(f"the proof does not show the root over the rows of piece {proof.piece}")
        return check_weight_rows(proof, root, self._plan)

    def missing(self) -> NotFoundError:
        return NotFoundError(
            f"the proof does not carry the weights that it is about, of model {self._model.root.hex()}",
            "Verify it where the model is: nexus model pull",
        )
