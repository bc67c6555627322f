"""Simulations: the program's own code over thousands of requests in which a part of the nodes cheats. Same seed, same table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from nexus.core.audits import DUAL, LIGHT, REPLICA
from nexus.swarm.audit_policy import AuditPolicy
from nexus_config.settings import default_text
from scripts.simulations import scale
from scripts.simulations.byzantine import Options, Swarm
from scripts.simulations.cheaters import STRATEGIES
from scripts.simulations.model import STAGES, Model
from scripts.simulations.report import as_json, as_text


def main() -> int:
    if sys.argv[1:2] == ["chaos"]:
        # The same program as `nexus simulate chaos`, which an installed package has too.
        from nexus_cli.main import main as nexus

        sys.argv = ["nexus", "simulate", *sys.argv[1:]]
        nexus()
    defaults = tomllib.loads(default_text())["audit"]
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    simulations = parser.add_subparsers(dest="simulation", required=True, metavar="NAME")
    one = simulations.add_parser("byzantine", help="a swarm of which a part cheats: who is evicted when, and what got through")
    one.add_argument("--seed", type=int, default=1, help="everything follows from it [default: %(default)s]")
    one.add_argument("--nodes", type=int, default=60, help="[default: %(default)s]")
    one.add_argument("--requests", type=int, default=4000, help="[default: %(default)s]")
    one.add_argument("--malicious", type=float, default=0.33, help="share of the nodes that cheats [default: %(default)s]")
    one.add_argument("--askers", type=int, default=3, help="honest nodes that ask [default: %(default)s]")
    one.add_argument("--probation", type=int, default=defaults["probation_sessions"], help="[default: %(default)s, the setting]")
    one.add_argument(
        "--rate", type=float, default=defaults["rate"], help="audited after probation [default: %(default)s, the setting]"
    )
    one.add_argument("--light", action="store_true", help="audit some cells of each stage instead of computing all again")
    one.add_argument("--cells", type=int, default=defaults["cells"], help="of a light audit [default: %(default)s, the setting]")
    one.add_argument("--dual", action="store_true", help="run every request on two sets of nodes and compare")
    one.add_argument("--strategies", default="", help=f"only these, by comma: {', '.join(one.name for one in STRATEGIES)}")
    one.add_argument("--json", action="store_true", help="one JSON object on stdout")
    scale.add_arguments(simulations.add_parser("scale", help="10, 100, 1000 nodes: lookups, churn, traffic, plans and throughput"))
    options = parser.parse_args()
    if options.simulation == "scale":
        return scale.run(options)
    if options.light and options.dual:
        parser.error("--light and --dual exclude each other")
    chosen = tuple(name for name in options.strategies.split(",") if name)
    if set(chosen) - {strategy.name for strategy in STRATEGIES}:
        parser.error(f"there is no strategy {sorted(set(chosen) - {strategy.name for strategy in STRATEGIES})[0]!r}")
    honest = options.nodes - round(options.nodes * options.malicious)
    wanted = len(STAGES) * (2 if options.dual else 1)
    if not 0 < options.askers <= honest or honest <= wanted:
        parser.error(f"{honest} honest nodes are too few: there are to be {options.askers} askers, and {wanted} for a request")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nexus-simulation-") as directory:
        mode = DUAL if options.dual else LIGHT if options.light else REPLICA
        policy = AuditPolicy(mode, options.rate, options.probation, options.cells)
        told = Options(options.seed, options.nodes, options.requests, options.malicious, options.askers, policy, chosen)
        swarm = Swarm(told, Model(Path(directory)))
        swarm.run()
    print(f"{time.monotonic() - began_s:.0f} s", file=sys.stderr)
    report = as_json(swarm)
    print(json.dumps(report) if options.json else as_text(swarm))
    return 0 if report["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
