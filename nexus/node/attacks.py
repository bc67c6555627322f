"""What cheaters do, by name: for test networks (`nexus testnet up --byzantine`) and tests/attacks. No setting of a node leads here.

Each attack is a `Conduct`: the node behaves honestly in everything but what the attack is about. What becomes of each is in
docs/threats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nexus.core.errors import LocalError, UsageError
from nexus.core.hashing import HASH_BYTES, leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import Manifest
from nexus.core.record import Record
from nexus.node.cheating import Conduct, Honest
from nexus.node.infer.messages import Open, OwnReceipt, OwnTrace, Push
from nexus.node.signing import Signer
from nexus.proof.receipts import SignedReceipt
from nexus.proof.trace import CELL_BYTES, TraceShape, WindowTrace
from nexus.storage.sessions import Window

if TYPE_CHECKING:
    from nexus.core.errors import NexusError
    from nexus.engine.stage import Stage
    from nexus.proof.audit import Cell, Opening
    from nexus.proof.audit_check import AuditedStage

# Where a cheater's node has the files of a stage.
StageFiles = Callable[[Manifest, int, int], Mapping[str, Path]]


@dataclass(frozen=True, slots=True)
class Means:
    """What an attack works with."""

    identity: Identity
    files: StageFiles


@dataclass(frozen=True, slots=True)
class Attack:
    """`summary`: what the cheater does, in a line."""

    name: str
    summary: str
    make: Callable[[Means], Conduct]


class _Tampered(Honest):
    """Loads something else than the model, computes with that, and commits to what comes out."""

    def __init__(self, means: Means, tampering: str) -> None:
        self._means = means
        self._tampering = tampering
        self._loaded: dict[tuple[bytes, int, int], Stage] = {}

    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        from nexus.engine.exact.tampering import TAMPERINGS, load_tampered_stage

        key = (manifest.root, stage.start, stage.end)
        if key not in self._loaded:
            files = self._means.files(manifest, stage.start, stage.end)
            self._loaded[key] = load_tampered_stage(TAMPERINGS[self._tampering], manifest, stage.start, stage.end, files)
        return self._loaded[key]

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        """What it computed with: it sticks to its story."""
        used = self._loaded.get((subject.manifest.root, stage.start, stage.end), stage)
        return super().show(used, subject, cells, files)


class _Disguise:
    """Passes for the stage that it wraps, in all but what subclasses change."""

    def __init__(self, stage: Stage, shape: TraceShape | None) -> None:
        self._stage = stage
        self._shape = shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)


class _FalseOutputs(_Disguise):
    """Honest traces, other outputs: `change` makes them of (stage, session, output, input)."""

    def __init__(self, stage: Stage, shape: TraceShape | None, change: Callable[[Stage, bytes, bytes, bytes], bytes]) -> None:
        super().__init__(stage, shape)
        self._change = change

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        answers = self._stage.step_many(steps, more)
        return [
            self._change(self._stage, session, answer, payload) if isinstance(answer, bytes) and answer else answer
            for (session, payload), answer in zip(steps, answers, strict=True)
        ]


class _Outputs(Honest):
    def __init__(self, change: Callable[[Stage, bytes, bytes, bytes], bytes]) -> None:
        self._change = change

    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return cast("Stage", _FalseOutputs(stage, stage.trace_shape, self._change))


def _not_a_number(stage: Stage, session: bytes, output: bytes, payload: bytes) -> bytes:
    """Hidden states that are not numbers; tokens stay as they are."""
    return output if stage.last else b"\x00\x00\xc0\x7f" * (len(output) // 4)


def _made_up(stage: Stage, session: bytes, output: bytes, payload: bytes) -> bytes:
    """Numbers of the right form that have nothing to do with the input but its hash."""
    stream = b"".join(blake2b(payload, salt=number.to_bytes(16, "little")).digest() for number in range(len(output) // 64 + 1))
    if stage.last and stage.causal:
        return (int.from_bytes(stream[:4], "little") % stage.manifest.vocab_size).to_bytes(4, "little")
    import numpy as np

    return (np.frombuffer(stream[: len(output) // 4], np.int8).astype("<f4") / 32).tobytes()


class _LazyCopy:
    """The last output once more, as long as it has the right size."""

    def __init__(self) -> None:
        self._last: dict[bytes, bytes] = {}

    def __call__(self, stage: Stage, session: bytes, output: bytes, payload: bytes) -> bytes:
        last = self._last.get(session, output)
        copied = last if len(last) == len(output) else output
        self._last = {session: output}
        return copied


class _StaleInputs(_Disguise):
    """Computes every step of one token with the token before, so that what it keeps of the session is stale."""

    def __init__(self, stage: Stage, shape: TraceShape | None) -> None:
        super().__init__(stage, shape)
        self._before: dict[bytes, bytes] = {}

    def open(self, session: bytes, sampling: Any, commit: bool = False) -> None:
        self._before.pop(session, None)
        self._stage.open(session, sampling, commit)

    def close(self, session: bytes) -> None:
        self._before.pop(session, None)
        self._stage.close(session)

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        return self._stage.step_many([(session, self._stale(session, payload)) for session, payload in steps], more)

    def _stale(self, session: bytes, payload: bytes) -> bytes:
        if len(payload) != self._stage.input_size(1):
            return payload  # a prompt
        before, self._before[session] = self._before.get(session, payload), payload
        return before


class _StaleCache(Honest):
    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return cast("Stage", _StaleInputs(stage, stage.trace_shape))


class _LeastBit(_Disguise):
    """Changes the last bit of one number of every output, and the trace with it."""

    def __init__(self, stage: Stage, shape: TraceShape | None) -> None:
        super().__init__(stage, shape)
        self._sent: dict[bytes, list[bytes]] = {}

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        answers = self._stage.step_many(steps, more)
        if self._stage.last:
            return answers
        changed: list[bytes | NexusError] = []
        for number, ((session, payload), answer) in enumerate(zip(steps, answers, strict=True)):
            if isinstance(answer, bytes) and len(payload) == self._stage.input_size(1) and not (more and more[number]):
                answer = bytes([answer[0] ^ 1]) + answer[1:]
                self._sent.setdefault(session, []).append(leaf_hash(answer))
            elif isinstance(answer, bytes) and not (more and more[number]):
                self._sent.setdefault(session, []).append(b"")  # a prompt: left as it is
            changed.append(answer)
        return changed

    def seal(self, session: bytes, steps: int) -> WindowTrace:
        trace = self._stage.seal(session, steps)
        assert self._shape is not None
        sent, size, cells = self._sent.get(session, []), self._shape.step_bytes, bytearray(trace.cells)
        for step, leaf in enumerate(sent[:steps]):
            if leaf:
                end = step * size + self._shape.layers * CELL_BYTES
                cells[end - HASH_BYTES : end] = leaf
        self._sent[session] = sent[steps:]
        return replace(trace, cells=bytes(cells))


class _OneBit(Honest):
    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return cast("Stage", _LeastBit(stage, stage.trace_shape))


class _FalseSeal(_Disguise):
    """Right outputs, other hashes behind them."""

    def __init__(self, stage: Stage, shape: TraceShape | None, change: Callable[[WindowTrace], WindowTrace]) -> None:
        super().__init__(stage, shape)
        self._change = change

    def seal(self, session: bytes, steps: int) -> WindowTrace:
        return self._change(self._stage.seal(session, steps))


class _Seals(Honest):
    def __init__(self, change: Callable[[WindowTrace], WindowTrace]) -> None:
        self._change = change

    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return cast("Stage", _FalseSeal(stage, stage.trace_shape, self._change))


class _AuthenticSums(_Seals):
    """Shows to audits what it computed, which is right, whatever it signed for."""

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        from nexus.engine.exact.audit import StageWeights
        from nexus.engine.exact.replay import replay
        from nexus.engine.exact.stage import ExactStage
        from nexus.proof.arithmetic.sampler import Sampling
        from nexus.proof.audit_open import open_cell

        assert isinstance(stage, ExactStage)
        done = replay(stage, subject.inputs, Sampling.of(subject.terms) if subject.is_last else None)
        weights = StageWeights(subject.manifest, subject.exact, files)
        return [open_cell(subject, done, weights, cell) for cell in cells]


def _scrambled(hashes: bytes) -> bytes:
    return b"".join(leaf_hash(hashes[at : at + HASH_BYTES]) for at in range(0, len(hashes), HASH_BYTES))


class _Signs(Honest):
    """Signs with `make`: (the honest signer, the cheater's identity)."""

    def __init__(self, make: Callable[[Signer, Identity], Signer], identity: Identity) -> None:
        self._make = make
        self._identity = identity

    def signer(self, opened: Open, signer: Signer) -> Signer:
        return self._make(signer, self._identity)


class _ForgedSignature:
    def __init__(self, signer: Signer, identity: Identity) -> None:
        self._signer = signer

    async def sign(self, window: Window) -> SignedReceipt:
        signed = await self._signer.sign(window)
        return replace(signed, signature=bytes([signed.signature[0] ^ 1]) + signed.signature[1:])


class _BrokenChain:
    """Signs for another input than the stage before signed to have given. A first stage of a language model, whose input is no
    stage's output, names a predecessor that it does not continue."""

    def __init__(self, signer: Signer, identity: Identity) -> None:
        self._signer = signer
        self._identity = identity

    async def sign(self, window: Window) -> SignedReceipt:
        await self._signer.sign(window)
        return SignedReceipt.sign(replace(window.receipt, in_root=leaf_hash(window.receipt.in_root)), self._identity)


class _Equivocates(Honest):
    """Tells the next stage another thing than the coordinator, and signs both."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        if not isinstance(message, OwnReceipt) or to_coordinator:
            return (message,)
        return (replace(message, receipt=self._other(message.receipt)),)

    def _other(self, signed: SignedReceipt) -> SignedReceipt:
        return SignedReceipt.sign(replace(signed.receipt, trace_root=leaf_hash(signed.receipt.trace_root)), self._identity)


class _Replays(Honest):
    """Signs once, and answers every later session with the receipts of the first one."""

    def __init__(self) -> None:
        self._signed: dict[int, SignedReceipt] = {}

    def signer(self, opened: Open, signer: Signer) -> Signer:
        return _OldReceipts(signer, self._signed)


class _OldReceipts:
    def __init__(self, signer: Signer, signed: dict[int, SignedReceipt]) -> None:
        self._signer = signer
        self._signed = signed

    async def sign(self, window: Window) -> SignedReceipt:
        step0 = window.receipt.step0
        if step0 not in self._signed:
            self._signed[step0] = await self._signer.sign(window)
        return self._signed[step0]


class _Silent(Honest):
    """Does its work, and shows nothing of it."""

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        raise LocalError("this node does not show its work", "It is a cheater's")


class _WrongAnswers(Honest):
    """Computes what it should, and shows other bytes than it signed for."""

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        return [_one_byte_off(opening) for opening in super().show(stage, subject, cells, files)]


def _one_byte_off(opening: Opening) -> Opening:
    first, *others = opening.values
    return replace(opening, values=(replace(first, data=bytes([first.data[0] ^ 1]) + first.data[1:]), *others))


class _TampersOnTheWay(Honest):
    """Signs what it computed, and pushes something else on."""

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        if not isinstance(message, Push) or opened.stage == len(opened.plan.stages) - 1:
            return (message,)
        return (replace(message, payload=bytes([message.payload[0] ^ 1]) + message.payload[1:]),)


class _WithholdsTraces(Honest):
    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        return () if isinstance(message, OwnTrace) else (message,)


def _tampered(name: str, summary: str) -> Attack:
    return Attack(name, summary, lambda means: _Tampered(means, name))


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        _tampered("swapped-weights", "computes with the weights of another model"),
        _tampered("requantised-weights", "computes with weights of four bits instead of eight"),
        _tampered("pruned-weights", "computes with small weights left out"),
        _tampered("flipped-bit", "computes with one wrong bit in one weight of every layer"),
        _tampered("skipped-layer", "leaves out every other layer"),
        _tampered("truncated-cache", "looks back eight tokens instead of all"),
        _tampered("wrong-tables", "computes exp with half the precision"),
        Attack("stale-cache", "computes every token from the one before, and keeps what it then had", lambda means: _StaleCache()),
        Attack("random-output", "answers with numbers that it made up", lambda means: _Outputs(_made_up)),
        Attack("lazy-copy", "answers with its last answer once more", lambda means: _Outputs(_LazyCopy())),
        Attack("overflow", "gives the next stage values that are not numbers", lambda means: _Outputs(_not_a_number)),
        Attack("one-bit", "changes the last bit of one number, and its commitments with it", lambda means: _OneBit()),
        Attack(
            "forged-trace",
            "answers rightly, and commits to something else",
            lambda means: _AuthenticSums(lambda trace: replace(trace, cells=_scrambled(trace.cells))),
        ),
        Attack(
            "rewritten-log",
            "answers rightly, and commits to another log of keys and values",
            lambda means: _Seals(lambda trace: replace(trace, logs=_scrambled(trace.logs))),
        ),
        Attack("forged-signature", "signs with a broken signature", lambda means: _Signs(_ForgedSignature, means.identity)),
        Attack("broken-chain", "signs for an input that nobody gave it", lambda means: _Signs(_BrokenChain, means.identity)),
        Attack("equivocation", "signs two different receipts for the same work", lambda means: _Equivocates(means.identity)),
        Attack("replayed-receipts", "answers with receipts of an earlier session", lambda means: _Replays()),
        Attack("silent", "does its work, and shows nothing of it to audits", lambda means: _Silent()),
        Attack("wrong-answer", "does its work, and shows something else to audits", lambda means: _WrongAnswers()),
        Attack("tampering-relay", "pushes other bytes on than it signed for", lambda means: _TampersOnTheWay()),
        Attack("withheld-trace", "keeps its commitments to itself", lambda means: _WithholdsTraces()),
    )
}


def conduct_of(name: str, means: Means) -> Conduct:
    """The conduct of a cheater. Raises UsageError for a name that is not in ATTACKS."""
    if name not in ATTACKS:
        raise UsageError(f"there is no attack {name!r}", f"`nexus attacks` lists them: {', '.join(ATTACKS)}")
    return ATTACKS[name].make(means)
