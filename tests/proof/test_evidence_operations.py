"""Proofs of wrong operations, end to end: real stages of odd models compute, cheaters among them; what is proven is verified
from its bytes alone. And the other way round: about what an honest stage did, nothing can be proven."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_range_proof, merkle_root
from nexus.core.manifest import Manifest
from nexus.engine.exact.audit import answer
from nexus.engine.exact.replay import replay
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.tampering import TAMPERINGS, load_tampered_stage
from nexus.engine.importer import import_model
from nexus.proof.accuse import LOG, OUTPUT, Difference, accuse, accuse_answer, accuse_opening, first_difference, prove_difference
from nexus.proof.arithmetic.plan import plan_from_json, value_widths
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.audit import AuditAnswer, Cell, Opening, SignedAuditAnswer
from nexus.proof.audit_check import AuditedStage
from nexus.proof.evidence import FALSE_RESPONSE, KV, OP, Evidence, Verdict, verify_evidence
from nexus.proof.evidence.exhibits import LogRecords
from nexus.proof.evidence.operation import APPEND, Claim, Proof
from nexus.proof.trace import ATTENTION, CELL_BYTES, LOGITS, OPS, QKV, op_root_of
from tests.engine.conftest import Folder, make_model, minilm  # noqa: F401
from tests.engine.exact.conftest import VARIANTS, Models, exact_model  # noqa: F401
from tests.proof.world import World, run

PROMPT = [[(7 * index + 3) % 131 for index in range(21)]]
TEXTS = [[101, 7592, 2088 + number, 102] for number in range(3)]
# Every place where what a stage works with, or the form of its commitments, differs.
SOME = ("llama", "llama-tied-biased", "qwen2-window", "qwen3", "gemma2", "gemma3")


@pytest.fixture(scope="session")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:  # noqa: F811
    folder = Folder(tmp_path_factory.mktemp("minilm-proven"))
    return import_model(minilm, folder, lambda *_: None, profile="exact"), folder


def verdict_of(evidence: Evidence | None) -> Verdict:
    """What somebody says of the file who has nothing else."""
    assert evidence is not None
    return verify_evidence(Evidence.from_file(evidence.to_file()))


def cheat(name: str) -> Callable[[Manifest, int, int, Mapping[str, Path]], ExactStage]:
    return lambda *stage: load_tampered_stage(TAMPERINGS[name], *stage)


# --- cheaters ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", TAMPERINGS)
@pytest.mark.parametrize("variant", SOME)
def test_a_stage_with_other_weights_tables_or_memory_is_convicted(variant: str, attack: str, exact_model: Models) -> None:  # noqa: F811
    model = exact_model(variant)
    for cheater in (0, 1):
        world = run(model, PROMPT, cheaters={cheater: cheat(attack)})
        shape, accused = world.shape(cheater), world.accused(cheater)
        replayed = world.replay(cheater)
        if first_difference(shape, accused.traces, replayed) is None:
            assert attack in ("skipped-layer", "truncated-cache"), "only what changes nothing at all goes unpunished"
            continue
        evidence = accuse(accused, replayed, world.weights)
        verdict = verdict_of(evidence)
        assert verdict.accused == world.parts[cheater].identity.public_key
        assert (verdict.kind, verdict.stage, verdict.session) == (OP, cheater, world.terms.session)
        assert accuse(world.accused(1 - cheater), world.replay(1 - cheater), world.weights) is None


@pytest.mark.parametrize("attack", ["swapped-weights", "requantised-weights", "skipped-layer"])
def test_an_encoder_is_convicted(attack: str, encoder: tuple[Manifest, Folder]) -> None:
    world = run(encoder, TEXTS, cheaters={1: cheat(attack)}, window=2)
    evidence = accuse(world.accused(1), world.replay(1), world.weights)
    assert verdict_of(evidence).stage == 1


def test_a_proof_without_its_weights_takes_those_of_the_verifier(exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model("llama"), PROMPT, cheaters={0: cheat("pruned-weights")})
    evidence = accuse(world.accused(0), world.replay(0), world.weights)
    assert evidence is not None
    bare = replace(Proof.from_bytes(evidence.body), weights=()).evidence()
    with pytest.raises(NotFoundError, match=world.manifest.root.hex()):
        verify_evidence(bare)
    assert verify_evidence(bare, world.weights).accused == world.parts[0].identity.public_key


# --- one value, one record, one payload that is not what was computed -------------------------------------------------------------


def tampered_cells(world: World, stage: int, step: int, layer: int, op: str, change: Callable[[np.ndarray], None]) -> None:
    """The stage commits to another value than it computed, and signs that. `layer`: of the stage."""
    replayed, part, shape = world.replay(stage), world.parts[stage], world.shape(stage)
    values = np.array(replayed.values(step, layer, op), np.float32).reshape(-1, replayed_width(world, stage, op))
    change(values)
    window = step // world.terms.window
    trace, n = part.traces[window], len(part.traces[window].cells) // shape.step_bytes
    at = (step - world.terms.window * window) * shape.step_bytes
    at += shape.layers * CELL_BYTES if op == LOGITS else layer * CELL_BYTES + OPS.index(op) * 32
    root = op_root_of([row.tobytes() for row in values])
    assert n
    part.traces[window] = replace(trace, cells=trace.cells[:at] + root + trace.cells[at + 32 :])
    world.sign()


def replayed_width(world: World, stage: int, op: str) -> int:
    return value_widths(plan_from_json(world.exact_plan))[op]


def one_bit(values: np.ndarray) -> None:
    """Of the last element of the last row: the smallest lie there is."""
    values.view(np.uint32)[-1, -1] ^= 1


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen2-window"])
@pytest.mark.parametrize("step", [0, 1, 9])
@pytest.mark.parametrize("op", [*OPS, LOGITS])
def test_the_last_bit_of_one_number_convicts(variant: str, step: int, op: str, exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model(variant), PROMPT)
    stage, layer = (1, 0) if op == LOGITS else (0, 1)
    tampered_cells(world, stage, step, layer, op, one_bit)
    verdict = verdict_of(accuse(world.accused(stage), world.replay(stage), world.weights))
    assert (verdict.step, verdict.op) == (step, op)
    assert verdict.layer == (None if op == LOGITS else layer)


def tampered_log(world: World, stage: int, window: int, layer: int, head: int, position: int) -> list[bytes]:
    """The stage signs for a log with another record in it at the end of one window; the changed records."""
    part, shape = world.parts[stage], world.shape(stage)
    records = world.replay(stage).records(layer, head, world.parts[stage].receipts[window].receipt.kv_len)
    records[position] = bytes([records[position][0] ^ 1]) + records[position][1:]
    root = merkle_root([leaf_hash(record) for record in records])
    trace, at = part.traces[window], (layer * shape.kv_heads + head) * 32
    part.traces[window] = replace(trace, logs=trace.logs[:at] + root + trace.logs[at + 32 :])
    world.sign()
    return records


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
@pytest.mark.parametrize(("window", "position"), [(0, 0), (0, 23), (1, 3), (1, 26), (2, 29)])
def test_a_rewritten_log_convicts(variant: str, window: int, position: int, exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model(variant), PROMPT)
    tampered_log(world, 1, window, 0, 1, position)
    verdict = verdict_of(accuse(world.accused(1), world.replay(1), world.weights))
    assert (verdict.kind, verdict.op, verdict.layer) == (KV, LOG, 2)


def test_a_log_that_is_no_append_convicts(exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model("llama"), PROMPT)
    position = 5
    changed = tampered_log(world, 1, 2, 0, 0, position)
    accused, replayed = world.accused(1), world.replay(1)
    proof = prove_difference(accused, replayed, Difference(2, 8, 0, LOG, 0))
    before = replayed.records(0, 0, accused.receipts[1].receipt.kv_len)

    def opened(when: int, records: list[bytes], window: int) -> LogRecords:
        siblings = merkle_range_proof([leaf_hash(record) for record in records], position, position + 1)
        logs = accused.traces[window].logs
        path = merkle_range_proof([logs[at : at + 32] for at in range(0, len(logs), 32)], 0, 1)
        return LogRecords(when, 2, 0, position, records[position], tuple(siblings), tuple(path))

    claim = Claim(APPEND, 8, 2, position, 1, 0, 0)
    shown = replace(proof, claim=claim, logs=(), cells=(), rows=(), records=(opened(0, changed, 2), opened(1, before, 1)))
    verdict = verdict_of(shown.evidence())
    assert (verdict.kind, verdict.op) == (KV, APPEND)
    honest = replace(shown, records=(opened(1, before, 1), replace(opened(1, before, 1), before=1)))
    with pytest.raises((MalformedError, VerificationError)):
        verify_evidence(honest.evidence())


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, seed=4, top_p=0.9), Sampling(temperature=0.7, repetition_penalty=1.3)]
)
@pytest.mark.parametrize("step", [0, 6])
def test_another_token_than_the_sampler_s_convicts(sampling: Sampling, step: int, exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model("llama"), PROMPT, sampling=sampling)
    part = world.parts[1]
    part.outputs[step] = bytes([part.outputs[step][0] ^ 1, *part.outputs[step][1:]])
    world.sign()
    verdict = verdict_of(accuse(world.accused(1), world.replay(1), world.weights))
    assert (verdict.op, verdict.step) == ("sample", step)


def test_other_bytes_sent_on_convict(exact_model: Models, encoder: tuple[Manifest, Folder]) -> None:  # noqa: F811
    world = run(exact_model("llama"), PROMPT)
    part = world.parts[0]
    part.outputs[5] = bytes([part.outputs[5][0] ^ 1, *part.outputs[5][1:]])
    world.sign()
    verdict = verdict_of(accuse(world.accused(0), world.replay(0), world.weights))
    assert (verdict.op, verdict.stage) == (OUTPUT, 0)
    world = run(encoder, TEXTS, window=2)
    part = world.parts[1]
    part.outputs[2] = bytes([part.outputs[2][0] ^ 1, *part.outputs[2][1:]])
    world.sign()
    verdict = verdict_of(accuse(world.accused(1), world.replay(1), world.weights))
    assert (verdict.op, verdict.step) == (OUTPUT, 2)


# --- with the help of the accused -----------------------------------------------------------------------------------------------


def openings(world: World, stage: int, cells: list[Cell], loaded: ExactStage | None = None) -> list[Opening]:
    part, own = world.parts[stage], world.plan.stages[stage]
    rows = [len(payload) // 4 for payload in world.parts[0].inputs]
    audited = AuditedStage(
        manifest=world.manifest,
        exact=plan_from_json(world.exact_plan),
        plan=world.plan,
        terms=world.terms,
        stage=stage,
        receipts=[signed.receipt for signed in part.receipts],
        traces=part.traces,
        inputs=part.inputs,
        results=(),
        rows=rows,
    )
    return answer(loaded or part.stage, audited, cells, world.folder.stage_files(world.manifest, own.start, own.end))


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
@pytest.mark.parametrize("attack", ["flipped-bit", "swapped-weights", "requantised-weights", "truncated-cache"])
def test_a_row_that_the_accused_opened_makes_the_proof_small(variant: str, attack: str, exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model(variant), PROMPT, cheaters={0: cheat(attack)})
    accused, replayed = world.accused(0), world.replay(0)
    difference = first_difference(world.shape(0), accused.traces, replayed)
    assert difference is not None
    wrong = replay(world.parts[0].stage, accused.inputs)
    theirs, ours = (each.values(difference.step, difference.layer, difference.op) for each in (wrong, replayed))
    row = next(row for row in range(len(ours)) if theirs[row].tobytes() != ours[row].tobytes())
    head = int(np.flatnonzero(theirs[row] != ours[row])[0]) // 12 // 2 if difference.op == ATTENTION else 0
    (opened,) = openings(world, 0, [Cell(difference.step, row, difference.layer, head)])
    small = accuse(accused, replayed, world.weights, opened)
    whole = accuse(accused, replayed, world.weights)
    verdict = verdict_of(small)
    assert verdict.element is not None
    assert small is not None
    assert whole is not None
    assert len(small.to_file()) < len(whole.to_file())
    # Nothing is needed but the opening, not even the session computed again.
    assert verdict_of(accuse_opening(accused, opened, difference.op, world.weights)) == verdict
    # Another row's opening, or none that holds, does not stand in the way.
    (other,) = openings(world, 0, [Cell(difference.step, row, 1 - difference.layer, head)])
    assert accuse(accused, replayed, world.weights, other) == whole


# --- answers to audits that are wrong in themselves -------------------------------------------------------------------------------


def signed_answer(world: World, stage: int, opened: Opening) -> SignedAuditAnswer:
    part = world.parts[stage]
    said = AuditAnswer(
        1, bytes(32), world.terms.session, part.receipts[-1].receipt.id, part.identity.public_key, stage, (opened.id,)
    )
    return SignedAuditAnswer.sign(said, part.identity)


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def lies(opened: Opening) -> Iterator[tuple[str, Opening]]:
    for number, op in enumerate(OPS):
        if opened.values[number].data:
            row = replace(opened.values[number], data=flipped(opened.values[number].data))
            yield op, replace(opened, values=(*opened.values[:number], row, *opened.values[number + 1 :]))
    if opened.x.data:
        yield "x", replace(opened, x=replace(opened.x, data=flipped(opened.x.data)))
    if opened.records:
        yield LOG, replace(opened, records=flipped(opened.records))
    if opened.context:
        yield QKV, replace(opened, context=(flipped(opened.context[0]), *opened.context[1:]))
    if opened.output.data:
        yield OUTPUT, replace(opened, output=replace(opened.output, data=flipped(opened.output.data)))


def test_an_answer_that_does_not_lead_to_what_was_signed_for_convicts(
    exact_model: Models,  # noqa: F811
    encoder: tuple[Manifest, Folder],
) -> None:
    for world in (run(exact_model("llama"), PROMPT), run(encoder, TEXTS, window=2)):
        for stage in (0, 1):
            for opened in openings(world, stage, [Cell(2, 0, layer, 1) for layer in range(world.shape(stage).layers)]):
                parts = []
                for part, lie in lies(opened):
                    parts.append(part)
                    accused = world.accused(stage)
                    verdict = verdict_of(accuse_answer(accused, signed_answer(world, stage, lie), lie, part, world.weights))
                    assert (verdict.kind, verdict.op) == (FALSE_RESPONSE, part)
                    with pytest.raises(VerificationError, match="is right"):
                        accuse_answer(accused, signed_answer(world, stage, opened), opened, part, world.weights)
                    with pytest.raises(VerificationError, match="not in it"):
                        accuse_answer(accused, signed_answer(world, stage, opened), lie, part, world.weights)
                assert len(parts) >= 5


def test_wrong_sums_convict(exact_model: Models) -> None:  # noqa: F811
    world = run(exact_model("gemma3"), PROMPT)
    for opened in openings(world, 1, [Cell(9, 0, 0, 0)]):
        for number, op in enumerate(("qkv", "o", "gate_up", "down")):
            sums = opened.sums[number]
            lie = replace(
                opened,
                sums=(
                    *opened.sums[:number],
                    replace(sums, data=sums.data[:40] + flipped(sums.data[40:])),
                    *opened.sums[number + 1 :],
                ),
            )
            accused = world.accused(1)
            if op == "qkv":  # x of a stage's first layer is a payload, and the value itself shows the fault
                with pytest.raises(VerificationError):
                    accuse_answer(accused, signed_answer(world, 1, lie), lie, op, world.weights, sums=True)
                continue
            verdict = verdict_of(accuse_answer(accused, signed_answer(world, 1, lie), lie, op, world.weights, sums=True))
            assert (verdict.op, verdict.element) == (op, 10)
            with pytest.raises(VerificationError, match="is right"):
                accuse_answer(accused, signed_answer(world, 1, opened), opened, op, world.weights, sums=True)


# --- honest stages ----------------------------------------------------------------------------------------------------------------


def differences(world: World, stage: int) -> Iterator[Difference]:
    """Every place where a difference could be."""
    shape = world.shape(stage)
    for window, (step0, n) in enumerate(world.windows()):
        for step in range(step0, step0 + n):
            for layer in range(shape.layers):
                for op in OPS:
                    yield Difference(window, step, layer, op)
            if shape.logits:
                yield Difference(window, step, shape.layers, LOGITS)
        yield from (Difference(window, step0, layer, LOG, head) for layer in range(shape.layers) for head in range(shape.kv_heads))


@pytest.mark.parametrize("variant", [*VARIANTS, "encoder"])
def test_everything_that_an_honest_stage_signed_for_is_right(
    variant: str,
    exact_model: Models,  # noqa: F811
    encoder: tuple[Manifest, Folder],
) -> None:
    """Every claim about every value and log of a session is checked and refused, so the verifier's arithmetic is the stage's."""
    is_encoder = variant == "encoder"
    model = encoder if is_encoder else exact_model(variant)
    world = run(model, TEXTS if is_encoder else PROMPT, window=2 if is_encoder else 4)
    for stage in (0, 1):
        accused, replayed, weights = world.accused(stage), world.replay(stage), world.weights
        assert accuse(accused, replayed, weights) is None
        for difference in differences(world, stage):
            proof = prove_difference(accused, replayed, difference)
            with pytest.raises(VerificationError, match="is right"):
                verify_evidence(proof.evidence(), weights)


@pytest.mark.parametrize("variant", ["llama", "gemma3", "qwen2-window", "encoder"])
def test_no_opening_of_an_honest_stage_convicts_it(
    variant: str,
    exact_model: Models,  # noqa: F811
    encoder: tuple[Manifest, Folder],
) -> None:
    is_encoder = variant == "encoder"
    world = run(encoder if is_encoder else exact_model(variant), TEXTS if is_encoder else PROMPT, window=2 if is_encoder else 4)
    for stage in (0, 1):
        shape, weights, accused = world.shape(stage), world.weights, world.accused(stage)
        step, row = (2, 3) if is_encoder else (0, 20)
        cells = [Cell(step, row, layer, 1) for layer in range(shape.layers)]
        cells += [Cell(6, 0, layer, 0) for layer in range(shape.layers)] if not is_encoder else []
        if stage:
            cells.append(Cell(step, 0, shape.layers, 0))
        for opened in openings(world, stage, cells):
            result = opened.cell.layer == shape.layers
            ops = ([OUTPUT] if is_encoder else [LOGITS, OUTPUT]) if result else [*OPS, LOG, OUTPUT]
            for op in ops:
                with pytest.raises((VerificationError, MalformedError)) as caught:
                    accuse_opening(accused, opened, op, weights)
                if op in OPS or op == LOGITS:
                    assert "is right" in str(caught.value)
