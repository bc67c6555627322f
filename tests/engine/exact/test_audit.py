"""Openings of cells by real stages: an honest one passes always, whatever is changed in one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.errors import LocalError, VerificationError
from nexus.core.manifest import ENCODER, Manifest
from nexus.engine.exact.tampering import TAMPERINGS, load_tampered_stage
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage
from nexus.proof.arithmetic.sampler import GREEDY, Sampling
from nexus.proof.audit import Cell, OpenedRow, Opening, Sums
from nexus.proof.audit_check import OPENING, VALUE, check_cell, find_fault
from nexus.proof.receipts import tokens_to_bytes
from tests.engine.conftest import Folder
from tests.engine.exact.audited import AuditedSession, run_session
from tests.engine.exact.conftest import VARIANTS, Models, chain

SAMPLINGS = (GREEDY, Sampling(0.8, seed=5), Sampling(1.2, seed=9, top_k=20, repetition_penalty=1.3))


def session(model: tuple[Manifest, Folder], stages: int = 2, steps: int = 7, sampling: Sampling = GREEDY) -> AuditedSession:
    return run_session(model, chain(model, stages, None), [tokens_to_bytes(range(3, 30))], steps, sampling)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_honest_stage_opens_every_cell(name: str, exact_model: Models) -> None:
    run = session(exact_model(name), 2, 7, SAMPLINGS[sum(map(ord, name)) % 3])
    for number, seen in enumerate(run.seen):
        cells = [
            Cell(step, row, layer, head)
            for step, row in ((0, 0), (0, 26), (0, 13), (3, 0), (6, 0))
            for layer in range(seen.shape.layers)
            for head in range(seen.exact.kv_heads)
        ]
        cells += [Cell(step, 0, seen.shape.layers, 0) for step in (0, 4, 6) if seen.is_last]
        keys = run.keys(number, cells)
        for opening in run.answer(number, cells):
            check_cell(seen, keys, Opening.from_bytes(opening.to_bytes()))
            assert len(opening.to_bytes()) < seen.shown_bytes(opening.cell) + 4096


@pytest.fixture(scope="module")
def encoder(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:
    folder = Folder(tmp_path_factory.mktemp("minilm-exact"))
    return import_model(minilm, folder, lambda *_: None, profile="exact"), folder


def test_an_encoder_opens_every_cell(encoder: tuple[Manifest, Folder]) -> None:
    stages = chain(encoder, 2, None)
    texts = [tokens_to_bytes([101, 7592, 2088 + n, 102]) for n in range(5)]
    run = run_session(encoder, stages, texts, 0, GREEDY)
    for number, seen in enumerate(run.seen):
        assert seen.manifest.kind == ENCODER
        cells = [Cell(step, row, layer, 3) for step, row in ((0, 0), (4, 3)) for layer in (0, 2)]
        cells += [Cell(4, 0, seen.shape.layers, 0)] if seen.is_last else []
        keys = run.keys(number, cells)
        for opening in run.answer(number, cells):
            check_cell(seen, keys, opening)
            changed = replace(opening, context=(*opening.context[:-1], _flip(opening.context[-1])))
            fault = find_fault(seen, keys, changed)
            assert fault
            assert fault.kind == OPENING


def _flip(data: bytes, at: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _changed(opening: Opening, data: st.DataObject) -> Opening:
    """With one bit of what it shows flipped, or something left out."""
    parts = [("values", n) for n in range(len(opening.values))] + [("sums", n) for n in range(len(opening.sums))]
    parts += [("weights", n) for n in range(len(opening.weights))]
    parts += [(name, 0) for name in ("x", "output") if getattr(opening, name).data] + [("records", 0)] * bool(opening.records)
    name, number = data.draw(st.sampled_from(parts))
    shown = getattr(opening, name)

    def flipped(raw: bytes) -> bytes:
        return _flip(raw, data.draw(st.integers(0, len(raw) - 1)))

    def row(opened: OpenedRow) -> OpenedRow:
        if opened.siblings and data.draw(st.booleans()):
            return replace(opened, siblings=data.draw(st.sampled_from([opened.siblings[:-1], (*opened.siblings[:-1], bytes(32))])))
        return replace(opened, data=flipped(opened.data))

    if isinstance(shown, OpenedRow):
        return replace(opening, **{name: row(shown)})
    if isinstance(shown, bytes):
        return replace(opening, records=flipped(shown))
    items = list(shown)
    one = items[number]
    items[number] = row(one) if isinstance(one, OpenedRow) else Sums(flipped(one.data)) if isinstance(one, Sums) else flipped(one)
    return replace(opening, **{name: tuple(items)})


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_any_change_of_an_opening_is_found(name: str, exact_model: Models) -> None:
    run = session(exact_model(name))
    openings: list[tuple[int, Opening]] = []
    keys = []
    for number, seen in enumerate(run.seen):
        cells = [Cell(0, 11, 0, 0), Cell(5, 0, seen.shape.layers - 1, 1)]
        cells += [Cell(2, 0, seen.shape.layers, 0)] if seen.is_last else []
        keys.append(run.keys(number, cells))
        openings += [(number, opening) for opening in run.answer(number, cells)]

    @given(st.sampled_from(openings), st.data())
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    def holds(chosen: tuple[int, Opening], data: st.DataObject) -> None:
        number, opening = chosen
        with pytest.raises(VerificationError):
            check_cell(run.seen[number], keys[number], _changed(opening, data))

    holds()


def test_an_opening_of_another_cell_is_no_answer(exact_model: Models) -> None:
    run = session(exact_model("llama"))
    one, other = run.answer(0, [Cell(0, 1, 0, 0), Cell(0, 2, 0, 0)])
    keys = run.keys(0, [one.cell])
    fault = find_fault(run.seen[0], keys, replace(other, cell=one.cell))
    assert fault
    assert fault.kind == OPENING


def cheating(model: tuple[Manifest, Folder], stages: list[Stage], number: int, name: str) -> Stage:
    manifest, folder = model
    start, end = stages[number].start, stages[number].end
    files = folder.stage_files(manifest, start, end)
    return load_tampered_stage(TAMPERINGS[name], manifest, start, end, files)


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_cheater_shows_what_it_did(name: str, exact_model: Models) -> None:
    """Its openings lead to what it signed for, which is not what the model computes: for every such tampering there is a cell
    that says so."""
    model = exact_model("llama")
    stages = chain(model, 2, None)
    stages[0] = cheating(model, stages, 0, name)
    run = run_session(model, stages, [tokens_to_bytes(range(3, 30))], 7, GREEDY)
    seen = run.seen[0]
    cells = [Cell(step, 26 if step == 0 else 0, layer, 0) for step in (0, 5) for layer in range(seen.shape.layers)]
    keys = run.keys(0, cells)
    faults = [find_fault(seen, keys, opening) for opening in run.answer(0, cells)]
    found = [fault for fault in faults if fault]
    # A table that is coarse changes only values that round otherwise with it.
    assert found or name == "wrong-tables"
    assert all(fault.kind == VALUE for fault in found)
    other = [Cell(0, 0, 0, 0)]
    assert find_fault(run.seen[1], run.keys(1, other), run.answer(1, other)[0]) is None


def test_a_stage_that_computes_otherwise_than_it_signed_shows_nothing(exact_model: Models) -> None:
    """A broken machine must not produce the evidence against itself."""
    model = exact_model("llama")
    run = session(model)
    broken = cheating(model, list(run.stages), 1, "flipped-bit")
    with pytest.raises(LocalError, match="than what it signed for"):
        run.answer(1, [Cell(3, 0, 0, 0)], broken)
