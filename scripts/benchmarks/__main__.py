"""Benchmarks as ratios, both sides measured in turn in one run.

Machines are noisy and differ; a ratio of two things measured alternately, round by round, is what can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from scripts.benchmarks import blocks, decode, embed, engine, memory, placement, receipts, search, sync, transfer, verify
from scripts.benchmarks.result import Result

SWARM: dict[str, Callable[[int, int, bool], Result]] = {"decode": decode.run, "receipts": receipts.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    common.add_argument("--quick", action="store_true", help="small and short: a smoke test, no figure to publish")
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    for name in SWARM:
        bench = benches.add_parser(name, parents=[common], help=f"{name} in a swarm on loopback")
        bench.add_argument("--rounds", type=int, default=9, help="alternating rounds; the median counts [default: %(default)s]")
        bench.add_argument("--tokens", type=int, default=128, help="tokens per round, the first left out [default: %(default)s]")
    bench = benches.add_parser("engine", parents=[common], help="the engine against transformers and llama.cpp, no network")
    engine.add_arguments(bench)
    bench = benches.add_parser("memory", parents=[common], help="what a fragment and a conversion take in memory")
    memory.add_arguments(bench)
    bench = benches.add_parser("verify", parents=[common], help="what proving, replaying and checking cost")
    verify.add_arguments(bench)
    bench = benches.add_parser(
        "placement", parents=[common], help="plans beside the optimum and beside Petals' and prima.cpp's rules"
    )
    placement.add_arguments(bench)
    bench = benches.add_parser("blocks", parents=[common], help="checking blocks of the shared memory, beside skyfield")
    blocks.add_arguments(bench)
    bench = benches.add_parser("embed", parents=[common], help="the default embedder beside sentence-transformers")
    embed.add_arguments(bench)
    bench = benches.add_parser("sync", parents=[common], help="what two nodes tell each other to find out what each lacks")
    sync.add_arguments(bench)
    bench = benches.add_parser("search", parents=[common], help="the memory's search beside usearch, chroma and lancedb")
    search.add_arguments(bench)
    bench = benches.add_parser("transfer", parents=[common], help="a gigabyte between two nodes, beside plain TLS")
    transfer.add_arguments(bench)
    options = parser.parse_args()
    if options.bench in SWARM:
        rounds = min(options.rounds, 3) if options.quick else options.rounds
        result = SWARM[options.bench](rounds, options.tokens, options.quick)
    else:
        result = {
            "blocks": blocks.run,
            "embed": embed.run,
            "engine": engine.run,
            "memory": memory.run,
            "placement": placement.run,
            "search": search.run,
            "sync": sync.run,
            "transfer": transfer.run,
            "verify": verify.run,
        }[options.bench](options)
    if options.json:
        print(json.dumps(result.as_dict()))
    else:
        result.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
