"""scripts/bench NAME [--json]: benchmarks as ratios, both sides measured in turn in one run.

Machines are noisy and differ; a ratio of two things measured alternately, round by round, is what can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys

from scripts.benchmarks import decode, receipts
from scripts.benchmarks.result import Result

BENCHES = {"decode": decode.run, "receipts": receipts.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("bench", choices=sorted(BENCHES))
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds per comparison; the median counts [default: 9]")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per round, the first left out [default: 128]")
    parser.add_argument("--quick", action="store_true", help="nano only, three rounds: a smoke test, no figure to publish")
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 3)
    result: Result = BENCHES[options.bench](options.rounds, options.tokens, options.quick)
    if options.json:
        print(json.dumps(result.as_dict()))
    else:
        result.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
