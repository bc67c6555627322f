"""The attack catalogue: what is tried, how it is found, what is proven, and what follows. One row is one test.

docs/threats.md shows the same table; `test_catalogue.py` keeps the two, and the tests, equal. Every test asserts its row's outcome
from the state of real nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nexus.proof.evidence import CHAIN, EQUIVOCATION, FALSE_RESPONSE, FORK, KV, OP
from nexus.swarm.standing import DEMOTED, SLASHED, SUSPENDED

# Beside the standings: the session is refused or given up, and who may have spoiled it is planned without for a time.
AVOIDED = "avoided"
# Nothing is accepted, nothing follows: anyone could have sent it, or it is no offence.
NOBODY = "nobody"
WORDS = {
    SLASHED: "slashed",
    SUSPENDED: "suspended, not slashed",
    DEMOTED: "demoted, not slashed",
    AVOIDED: "session refused; avoided for ten minutes",
    NOBODY: "refused; nobody is punished",
}


@dataclass(frozen=True)
class Outcome:
    """What becomes of an attacker: the kind of the evidence against it ("" where there is none), and what follows."""

    proof: str
    consequence: str


@dataclass(frozen=True)
class Row:
    """`test`: file and function in this directory. `names`: of `nexus.node.attacks.ATTACKS`, where a test network can show it."""

    attack: str
    detected: str
    proof: str
    consequence: str
    test: str
    names: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.proof, self.consequence)


CELLS = "an audit of sampled cells"
REPLICA = "a replica: the session computed again"
ROWS = (
    Row("other weights", CELLS, OP, SLASHED, "test_models.py::test_swapped_weights", ("swapped-weights",)),
    Row("re-quantised weights", CELLS, OP, SLASHED, "test_models.py::test_requantised_weights", ("requantised-weights",)),
    Row("pruned weights", CELLS, OP, SLASHED, "test_models.py::test_pruned_weights", ("pruned-weights",)),
    Row("one flipped bit of a weight", REPLICA, OP, SLASHED, "test_models.py::test_one_flipped_weight_bit", ("flipped-bit",)),
    Row("a layer left out", CELLS, OP, SLASHED, "test_models.py::test_a_skipped_layer", ("skipped-layer",)),
    Row("other tables", REPLICA, OP, SLASHED, "test_models.py::test_wrong_tables", ("wrong-tables",)),
    Row(
        "a kernel that saturates",
        "the stage's known answers, before it serves",
        "",
        NOBODY,
        "test_models.py::test_a_saturating_kernel_serves_nothing",
    ),
    Row("a made-up output", REPLICA, OP, SLASHED, "test_outputs.py::test_random_output", ("random-output",)),
    Row("an old answer once more", REPLICA, OP, SLASHED, "test_outputs.py::test_a_lazy_copy", ("lazy-copy",)),
    Row("the last bit of one number", REPLICA, OP, SLASHED, "test_outputs.py::test_one_bit_sabotage", ("one-bit",)),
    Row("a stale KV cache", REPLICA, OP, SLASHED, "test_outputs.py::test_a_stale_cache", ("stale-cache",)),
    Row("a truncated KV cache", REPLICA, OP, SLASHED, "test_outputs.py::test_a_truncated_cache", ("truncated-cache",)),
    Row("a rewritten KV log", REPLICA, KV, SLASHED, "test_outputs.py::test_a_rewritten_log", ("rewritten-log",)),
    Row(
        "right sums over a forged trace",
        "an audit: what is shown is not what was signed for",
        FALSE_RESPONSE,
        SLASHED,
        "test_outputs.py::test_authentic_sums_over_a_forged_trace",
        ("forged-trace",),
    ),
    Row(
        "values that overflow, or are no numbers",
        "the next stage, by its bounds, before it computes",
        "",
        AVOIDED,
        "test_outputs.py::test_an_overflow_for_the_next_stage",
        ("overflow",),
    ),
    Row(
        "a withheld trace",
        "the coordinator: no receipt counts without",
        "",
        AVOIDED,
        "test_receipts.py::test_a_withheld_trace",
        ("withheld-trace",),
    ),
    Row(
        "a forged signature",
        "the next stage and the coordinator",
        "",
        AVOIDED,
        "test_receipts.py::test_a_forged_signature",
        ("forged-signature",),
    ),
    Row(
        "a signature by a small-order key",
        "libsodium refuses such keys",
        "",
        NOBODY,
        "test_receipts.py::test_a_small_order_key",
    ),
    Row(
        "two receipts for one piece of work",
        "the coordinator, by what the next stage was given",
        EQUIVOCATION,
        SLASHED,
        "test_receipts.py::test_equivocation",
        ("equivocation",),
    ),
    Row(
        "an honest retry, after a restart too",
        "it is no attack: the same work gives the same receipt",
        "",
        NOBODY,
        "test_receipts.py::test_an_honest_retry_is_no_equivocation",
    ),
    Row(
        "a receipt that does not go with those it names",
        "the coordinator, by the chain",
        CHAIN,
        SLASHED,
        "test_receipts.py::test_a_broken_chain",
        ("broken-chain",),
    ),
    Row(
        "receipts of an earlier session",
        "the next stage and the coordinator: they bind the session",
        "",
        AVOIDED,
        "test_receipts.py::test_a_replay_across_sessions",
        ("replayed-receipts",),
    ),
    Row(
        "receipts of another model",
        "the next stage and the coordinator: they bind the model",
        "",
        AVOIDED,
        "test_receipts.py::test_a_replay_across_models",
    ),
    Row(
        "receipts of another stage",
        "the coordinator: they bind the stage",
        "",
        AVOIDED,
        "test_receipts.py::test_a_replay_across_stages",
    ),
    Row(
        "a relay that passes on other bytes",
        "the next stage, by the receipt that comes with them",
        "",
        AVOIDED,
        "test_receipts.py::test_a_tampering_relay",
        ("tampering-relay",),
    ),
    Row(
        "two stages in league, one covering for the other",
        REPLICA,
        OP,
        SLASHED,
        "test_receipts.py::test_adjacent_stages_in_league",
    ),
    Row(
        "a coordinator that gives one session two inputs",
        "the first stage: the terms name the input",
        "",
        NOBODY,
        "test_receipts.py::test_a_coordinator_with_two_inputs",
    ),
    Row(
        "a wrong answer to an audit",
        "the auditor, by what was signed for",
        FALSE_RESPONSE,
        SLASHED,
        "test_audits.py::test_a_wrong_answer",
        ("wrong-answer",),
    ),
    Row(
        "a prover that shows nothing",
        "the auditor; a replica still finds what is wrong",
        "",
        DEMOTED,
        "test_audits.py::test_a_silent_prover_is_demoted",
        ("silent",),
    ),
    Row(
        "a prover that is silent to all who ask",
        "a quorum of the session, each asking for itself",
        "",
        SUSPENDED,
        "test_audits.py::test_a_silent_prover_is_suspended_by_a_quorum",
    ),
    Row(
        "a wrong computation hidden behind silence",
        "a replica, by the hashes that came with the receipts",
        OP,
        SLASHED,
        "test_audits.py::test_silence_does_not_hide_what_was_computed",
    ),
    Row(
        "a challenge that is chosen, or used again",
        "the stage: the chain was registered before",
        "",
        NOBODY,
        "test_audits.py::test_a_ground_challenge",
    ),
    Row(
        "an auditor that keeps its findings back",
        "anybody else's audit",
        OP,
        SLASHED,
        "test_audits.py::test_an_auditor_that_withholds",
    ),
    Row(
        "an auditor in league with a cheater",
        "anybody else's audit: nobody's word acquits",
        OP,
        SLASHED,
        "test_audits.py::test_an_auditor_in_league",
    ),
    Row(
        "false accusations, of every kind",
        "every node verifies for itself",
        "",
        NOBODY,
        "test_audits.py::test_false_accusations",
    ),
    Row("malformed Merkle paths", "before a hash is trusted", "", NOBODY, "test_bytes.py::test_malformed_merkle_paths"),
    Row("huge openings and proofs", "bounds, before any work", "", NOBODY, "test_bytes.py::test_huge_openings"),
    Row(
        "CBOR with duplicates, tags, cycles",
        "one value has one byte form",
        "",
        NOBODY,
        "test_bytes.py::test_cbor_duplicates_tags_and_cycles",
    ),
    Row("clock games", "times are bounded where they count at all", "", NOBODY, "test_bytes.py::test_clock_games"),
    Row(
        "convictions in masses",
        "the fuse: it looks like a bug of ours",
        FORK,
        SUSPENDED,
        "test_swarm.py::test_the_mass_conviction_fuse",
    ),
    Row(
        "evidence reordered, or a swarm cut in two",
        "the set of the slashed grows to the same on all sides",
        FORK,
        SLASHED,
        "test_swarm.py::test_evidence_reordered_and_partitioned",
    ),
    Row("a bond spent twice", "whoever sees both entries", FORK, SLASHED, "test_swarm.py::test_a_bond_spent_twice"),
    Row(
        "a deviation in the float profile",
        "statistics: its receipts prove nothing",
        "",
        DEMOTED,
        "test_swarm.py::test_a_deviation_in_the_float_profile",
    ),
)


def row_of(test: str) -> Row:
    """The row of a test, by file and function."""
    (row,) = [row for row in ROWS if row.test == test]
    return row


def table(rows: Iterable[Row] = ROWS) -> str:
    """As docs/threats.md shows it."""
    lines = ["| attack | detected by | proof | what follows | test |", "|---|---|---|---|---|"]
    for row in rows:
        file, function = row.test.split("::")
        link = f"[`{function}`](../tests/attacks/{file})"
        lines.append(f"| {row.attack} | {row.detected} | {row.proof or '-'} | {WORDS[row.consequence]} | {link} |")
    return "\n".join(lines)
