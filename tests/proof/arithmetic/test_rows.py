"""Weight rows under the model root: every row can be proven, alone or in a run, and nothing else can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, PeerError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.manifest import EMBEDDING, HEAD, Manifest, layer_name
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.arithmetic.rows import (
    TABLES,
    Section,
    WeightProof,
    check_weights,
    float_rows,
    linear_leaves,
    linear_rows,
    piece_names,
    prove_weights,
    row_layout,
    rows_root,
    table_rows,
    tensor_leaves,
)
from tests.proof.arithmetic.made import Arrays, decoder_plans, encoder_plan, encoder_plans, make_plan, random_pieces, tables_of

plans = st.one_of(decoder_plans(), encoder_plans())


def all_leaves(plan: ExactPlan, name: str, arrays: Arrays) -> list[bytes]:
    """By the rule in docs/exact.md, spelled out."""
    leaves: list[bytes] = []
    if name == TABLES:
        for number in range(len(plan.ropes)):
            for kind in ("coarse", "fine"):
                leaves += [row.astype("<f8").tobytes() for row in arrays[f"rope.{number}.{kind}"]]
        return leaves
    rest = sorted(arrays)
    for part in ("qkv", "o", "gate_up", "down", "embed", "head"):
        if f"{part}.weight" in arrays:
            for row in range(len(arrays[f"{part}.weight"])):
                leaf = arrays[f"{part}.scale"][row].astype("<f4").tobytes()
                if f"{part}.bias" in arrays:
                    leaf += arrays[f"{part}.bias"][row].astype("<f4").tobytes()
                leaves.append(leaf + arrays[f"{part}.weight"][row].tobytes())
            rest = [tensor for tensor in rest if not tensor.startswith(f"{part}.")]
    for tensor in rest:
        values: NDArray[Any] = arrays[tensor]
        leaves += [row.astype("<f4").tobytes() for row in (values if values.ndim == 2 else [values])]
    return leaves


def arrays_of(plan: ExactPlan, seed: int) -> dict[str, Arrays]:
    tables = dict(tables_of(plan.ropes, plan.rotated, plan.context))
    return random_pieces(plan, seed) | {TABLES: tables}


def manifest_of(plan: ExactPlan, leaves: dict[str, list[bytes]]) -> Manifest:
    roots = tuple(merkle_root(map(leaf_hash, leaves[name])) for name in piece_names(plan))
    return Manifest(1, "causal", "Toy", "exact", "int8", len(plan.layers), plan.hidden, plan.vocab, 512, 0, 0, (), (), roots)


@settings(max_examples=40, deadline=None)
@given(plans, st.integers(0, 99))
def test_the_layout_is_the_rule(plan: ExactPlan, seed: int) -> None:
    for name, arrays in arrays_of(plan, seed).items():
        layout, leaves = row_layout(plan, name), all_leaves(plan, name, arrays)
        assert layout.total == len(leaves)
        if leaves:
            assert layout.leaf_sizes(0, layout.total) == [len(leaf) for leaf in leaves]
            assert layout.range_bytes(0, layout.total) == sum(map(len, leaves))
        for section in layout.sections:
            here = leaves[section.first : section.first + section.count]
            assert all(len(leaf) == section.leaf_bytes for leaf in here)
            check_section(section, here, arrays)


def check_section(section: Section, leaves: list[bytes], arrays: Arrays) -> None:
    """That the rows come back out of the leaves, and that making them by block gives the same."""
    name = section.name
    if section.linear:
        rows = linear_rows(section, leaves)
        bias = arrays.get(f"{name}.bias")
        np.testing.assert_array_equal(rows.weight, arrays[f"{name}.weight"])
        np.testing.assert_array_equal(rows.scale, arrays[f"{name}.scale"])
        assert (rows.bias is None) == (bias is None)
        if bias is not None:
            np.testing.assert_array_equal(rows.bias, bias)
        made = linear_leaves(arrays[f"{name}.weight"], arrays[f"{name}.scale"], bias)
    elif section.float64:
        np.testing.assert_array_equal(table_rows(section, leaves), arrays[name])
        made = tensor_leaves(arrays[name])
    else:
        values = arrays[name]
        np.testing.assert_array_equal(float_rows(section, leaves), values if values.ndim == 2 else values[None])
        made = tensor_leaves(values)
    assert [row.tobytes() for row in made] == leaves


@settings(max_examples=60, deadline=None)
@given(plans, st.data())
def test_any_run_of_rows_is_proven_and_nothing_else(plan: ExactPlan, data: st.DataObject) -> None:
    leaves = {name: all_leaves(plan, name, arrays) for name, arrays in arrays_of(plan, 7).items()}
    manifest = manifest_of(plan, leaves)
    names = piece_names(plan)
    piece = data.draw(st.sampled_from([number for number, name in enumerate(names) if leaves[name]]))
    here = leaves[names[piece]]
    index = data.draw(st.integers(0, len(here) - 1))
    count = data.draw(st.integers(1, min(9, len(here) - index)))
    hashes = [leaf_hash(leaf) for leaf in here]
    assert rows_root(hashes) == manifest.rows[piece]
    proof = prove_weights(piece, index, here[index : index + count], hashes)
    assert check_weights(WeightProof.from_bytes(proof.to_bytes()), manifest, plan) == here[index : index + count]
    at = data.draw(st.integers(0, len(proof.data) - 1))
    other = bytes([proof.data[at] ^ (1 << data.draw(st.integers(0, 7)))])
    wrong = [
        replace(proof, data=proof.data[:at] + other + proof.data[at + 1 :]),
        replace(proof, data=proof.data + b"\0"),
        replace(proof, data=b""),
        replace(proof, count=count + 1),
        replace(proof, index=len(here)),
        replace(proof, index=2**32),
        replace(proof, count=2**32),
        replace(proof, piece=len(names)),
        replace(proof, siblings=(*proof.siblings, bytes(32))),
        replace(proof, siblings=(bytes(32),) * len(proof.siblings) if proof.siblings else (bytes(32),)),
    ]
    for one in wrong:
        with pytest.raises(PeerError):
            check_weights(one, manifest, plan)


def test_a_row_is_not_anothers() -> None:
    """Two pieces of one shape, two rows of one piece: a proof of one is none of the other."""
    plan = make_plan()
    leaves = {name: all_leaves(plan, name, arrays) for name, arrays in arrays_of(plan, 3).items()}
    manifest = manifest_of(plan, leaves)
    hashes = [leaf_hash(leaf) for leaf in leaves[layer_name(0)]]
    proof = prove_weights(1, 5, leaves[layer_name(0)][5:6], hashes)
    check_weights(proof, manifest, plan)
    for wrong in (replace(proof, piece=2), replace(proof, index=4), replace(proof, index=6)):
        with pytest.raises(VerificationError):
            check_weights(wrong, manifest, plan)
    with pytest.raises(MalformedError, match="is not that of a plan"):
        check_weights(proof, replace(manifest, rows=manifest.rows[:-1]), plan)


def test_an_encoder_has_no_rows_behind_its_layers() -> None:
    plan = encoder_plan()
    assert row_layout(plan, HEAD).total == row_layout(plan, TABLES).total == 0
    embedding = row_layout(plan, EMBEDDING)
    names = ["embed", "embed_norm.bias", "embed_norm.weight", "position.weight", "type.weight"]
    assert [section.name for section in embedding.sections] == names
    assert embedding.section("position.weight").count == plan.context
    with pytest.raises(MalformedError, match="has no 'head'"):
        embedding.section("head")
    for name in ("layer.2", "layer.-1", "layer.00", "vectors", ""):
        with pytest.raises(MalformedError, match="no piece"):
            row_layout(plan, name)


def test_rows_of_other_sections_are_refused() -> None:
    plan = make_plan()
    layout, tables = row_layout(plan, layer_name(0)), row_layout(plan, TABLES)
    linear, vector, table = layout.section("qkv"), layout.section("mlp_norm.weight"), tables.section("rope.0.fine")
    for read, right in ((linear_rows, linear), (float_rows, vector), (table_rows, table)):
        read(right, [bytes(right.leaf_bytes)])
        with pytest.raises(MalformedError):
            read(right, [bytes(right.leaf_bytes + 1)])
        for section in (linear, vector, table):
            if section is not right:
                with pytest.raises(MalformedError):
                    read(section, [bytes(section.leaf_bytes)])
