"""The parts of scripts/simulate scale: lookups that end where they should, queues that keep what goes in, goals one can miss."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libp2p.kad_dht import common

from nexus.swarm.costs import StageCosts
from scripts.simulations import scale_dht
from scripts.simulations.scale import goals_of, joined, sizes_of, table
from scripts.simulations.scale_dht import ID_BITS, Network, Table, dht_figures
from scripts.simulations.scale_docs import markdown
from scripts.simulations.scale_inference import DTYPE, _Flow, _Stream, inference_figures
from scripts.simulations.scale_machine import (
    BATCH,
    BATCH_GAIN,
    HOP_S,
    PROVER_SHARE,
    SESSION_TOKENS,
    Machines,
    batch_factor,
    manifest,
)
from scripts.simulations.scale_membership import membership_figures, mesh_bytes


class TestDht:
    def test_the_numbers_are_those_of_the_library(self) -> None:
        assert (scale_dht.BUCKET_SIZE, scale_dht.ALPHA, scale_dht.BETA) == (common.BUCKET_SIZE, common.ALPHA, common.BETA)

    def test_a_table_keeps_whoever_is_near_and_twenty_of_each_distance(self) -> None:
        rng = random.Random(1)
        own = rng.getrandbits(ID_BITS)
        table = Table(own)
        others = [rng.getrandbits(ID_BITS) for _ in range(2000)]
        for other in others:
            table.add(other)
        by_distance: dict[int, int] = {}
        for other in table.closest(own, 2000):
            by_distance[(own ^ other).bit_length()] = by_distance.get((own ^ other).bit_length(), 0) + 1
        assert max(by_distance.values()) == 20
        nearest = sorted(others, key=lambda other: other ^ own)[:20]
        assert table.closest(own) == nearest

    def test_lookups_find_the_nearest_node_in_few_hops_also_with_dead_ones(self) -> None:
        whole, dead = dht_figures(1, 200)
        assert (whole, dead) == dht_figures(1, 200)
        assert whole.found == 1.0
        assert dead.found > 0.98
        assert 1 <= whole.hops_mean <= whole.hops_max <= 4

    def test_a_node_that_nobody_knows_is_not_found(self) -> None:
        network = Network(1)
        network.grow(30)
        hidden = network.rng.getrandbits(ID_BITS)
        network.tables[hidden] = Table(hidden)
        assert hidden not in network.lookup(next(iter(network.tables)), hidden).closest


class TestInference:
    def test_a_lone_stream_takes_what_its_stages_hops_and_links_take(self) -> None:
        costs = StageCosts(manifest(), DTYPE, SESSION_TOKENS)
        work = costs.work(0, costs.layers)
        machines = Machines(1, 2, work)
        flow = _Flow(machines, costs)
        flow.open(_Stream((0, 1), ((0, 8), (8, 16))), 0.0)
        flow.window = (0.0, 100.0)
        flow.run_to(100.0)
        compute_s = sum(
            costs.work(*span) / machine.speed * (1 + PROVER_SHARE) + HOP_S
            for span, machine in zip(((0, 8), (8, 16)), machines.all, strict=True)
        )
        step_s = compute_s + machines.rtt_s(0, 1)
        assert flow.steps == pytest.approx(100 / step_s, rel=0.03)
        assert flow.batched == flow.batches

    def test_streams_that_wait_together_are_one_batch_and_none_is_lost(self) -> None:
        costs = StageCosts(manifest(), DTYPE, SESSION_TOKENS)
        machines = Machines(1, 1, costs.work(0, costs.layers))
        flow = _Flow(machines, costs)
        for _ in range(BATCH):
            flow.open(_Stream((0,), ((0, 16),)), 0.0)
        flow.window = (10.0, 110.0)
        flow.run_to(110.0)
        # The first finds the node idle and is a batch of its own; the others wait for it, and it for them, ever after.
        one_s = costs.work(0, 16) / machines.all[0].speed * (1 + PROVER_SHARE)
        both_s = sum(one_s * batch_factor(count) + HOP_S * count for count in (1, BATCH - 1))
        assert flow.steps == pytest.approx(100 * BATCH / both_s, rel=0.03)
        assert BATCH / batch_factor(BATCH) == pytest.approx(BATCH_GAIN)

    def test_the_same_seed_gives_the_same_figures_and_more_nodes_give_more(self) -> None:
        one, again, more = inference_figures(1, 8), inference_figures(1, 8), inference_figures(1, 16)
        clocks = {"place_s": 0.0, "route_s": 0.0, "layout_s": 0.0}
        assert replace(one, **clocks) == replace(again, **clocks)
        assert more.inferences_per_s > 1.5 * one.inferences_per_s
        assert one.busy_max <= 1.0


@pytest.mark.slow
def test_the_real_membership_converges_the_same_way_each_time() -> None:
    one = membership_figures(3, 6)
    assert one == membership_figures(3, 6)
    assert one.known_mean == 5
    for seconds in (one.settled_s, one.ghosts_gone_s, one.joined_s, one.healed_s):
        assert seconds is not None
        assert seconds <= 120
    assert one.gossip_bytes > 0
    assert mesh_bytes(60, 600, 60.0, 100) > mesh_bytes(30, 300, 60.0, 100) > mesh_bytes(0, 0, 60.0, 100) == 0


def report(rates: dict[int, float], healed_s: float | None) -> dict[str, Any]:
    inference = [{"nodes": nodes, "inferences_per_s": rate} for nodes, rate in rates.items()]
    return {"seed": 1, "dht": [], "membership": [{"nodes": 10, "healed_s": healed_s}], "inference": inference}


def test_goals_can_be_missed() -> None:
    good = goals_of(report({50: 900.0, 100: 1700.0, 200: 3300.0}, 2.0))
    assert [goal["met"] for goal in good] == [True] * 5
    bad = goals_of(report({50: 900.0, 100: 990.0, 200: 1100.0}, None))
    assert [goal["met"] for goal in bad] == [False] * 5


def test_sizes_have_their_halves_and_doubles() -> None:
    assert sizes_of([10, 100, 1000]) == [10, 20, 50, 100, 200, 500, 1000]
    assert sizes_of([8]) == [8]


def test_parts_computed_apart_are_one_table(tmp_path: Path) -> None:
    whole, dead = dht_figures(1, 10)
    figures = {"nodes": 10, "whole": {}, "after_deaths": {}}
    for name, values in (("whole", whole), ("after_deaths", dead)):
        figures[name] = {field: getattr(values, field) for field in values.__slots__}
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(json.dumps({"seed": 1, "dht": [figures], "membership": [], "inference": []}))
    other.write_text(json.dumps({"seed": 1, "dht": [], "membership": [], "inference": []}))
    result = joined([one, other])
    assert table(result)[0] == ("nodes", "10")
    assert "| DHT: lookups that find the nearest | 100.0% |" in markdown(result)
    other.write_text(json.dumps({"seed": 2, "dht": [], "membership": [], "inference": []}))
    with pytest.raises(SystemExit, match="different seeds"):
        joined([one, other])
