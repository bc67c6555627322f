"""Real daemons on this machine under load, while nodes are killed, stopped, drained and restarted at random.

Every answer is compared with the one of the same request before anything failed. Exit code 1 where any is lost or differs. The same
seed gives the same faults in the same order; how they fall on the answers depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from nexus_cli.client import Daemon
from nexus_cli.testnet import NODES_MAX, Testnet
from scripts.benchmarks.models import endless_nano
from scripts.chaos_runs.faults import faults
from scripts.chaos_runs.report import Report, report_of
from scripts.chaos_runs.streams import SILENCE_MAX_S, Answer, Request, Stream, ask, requests_of
from scripts.chaos_runs.swarm import Chaos

UP_TIMEOUT_S = 180.0
# The shipped weights without an end token: answers that are long enough for a fault to meet them in the middle.
ENDLESS = "endless"
# An answer of many tokens, each with failovers; what has not ended by then is lost.
END_TIMEOUT_S = 240.0
REQUESTS = (
    Request("Why is the sky blue?", 300, 0.0, 1),
    Request("What is the largest planet?", 200, 0.0, 2),
    Request("Tell me about the sea.", 300, 1.0, 3),
    Request("Who are you?", 120, 0.0, 4),
    Request("What is a whale?", 300, 1.2, 5),
    Request("How far away is the moon?", 250, 0.0, 6),
    Request("Name a country.", 60, 0.7, 7),
    Request("What do bees make?", 300, 100.0, 8),
)


def run(seed: int, minutes: float, nodes: int, streams: int, stages: int, together: int, keep: Path | None) -> Report:
    """One run in a directory of its own. `keep`: where homes and logs go in the end."""
    with tempfile.TemporaryDirectory(prefix="nexus-chaos-") as directory:
        testnet = Testnet(Path(directory) / "t")
        try:
            members = testnet.up(nodes, UP_TIMEOUT_S, lambda message: print(message, file=sys.stderr))
            return _run(
                testnet, seed, minutes, streams, stages, together, endless_nano(Path(directory) / ENDLESS), members[0].socket
            )
        finally:
            if testnet.exists():
                testnet.down(keep=keep is not None)
            if keep is not None and testnet.directory.exists():
                shutil.copytree(testnet.directory, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))


def _run(
    testnet: Testnet, seed: int, minutes: float, streams: int, stages: int, together: int, model: Path, socket: Path
) -> Report:
    daemon = Daemon(socket)
    for _ in daemon.stream("/v0/models", {"source": str(model), "name": ENDLESS, "profile": "exact"}):
        pass
    daemon.close()
    expected: dict[Request, Answer] = {}
    for request in REQUESTS:
        expected[request] = answer = ask(socket, ENDLESS, request, stages, 0.0)
        if answer.error or not answer.verified:
            raise RuntimeError(f"undisturbed, {request.prompt!r} failed: {answer.error or 'not every receipt holds'}")
    print(f"{len(expected)} answers without faults; now with them", file=sys.stderr)

    began_s = time.monotonic()

    def seconds() -> float:
        return time.monotonic() - began_s

    over = threading.Event()
    chaos = Chaos(testnet, testnet.nodes(), seconds)
    every = [
        Stream(lambda request: ask(socket, ENDLESS, request, stages, seconds()), requests_of(number, REQUESTS), over)
        for number in range(streams)
    ]
    for stream in every:
        stream.start()
    try:
        chaos.run(faults(seed, [node.name for node in chaos.nodes[1:]]), minutes * 60, together)
        chaos.restore()
    finally:
        over.set()
    problems = [f"stream {at} has not ended" for at, stream in enumerate(every) if not stream.join(END_TIMEOUT_S + SILENCE_MAX_S)]
    return report_of(
        {"seed": seed, "minutes": minutes, "nodes": len(chaos.nodes)},
        expected,
        [stream.answers for stream in every],
        chaos.struck,
        [*chaos.problems, *problems],
        chaos.longest_return_s,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long nodes are struck [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of the faults [default: %(default)s]")
    parser.add_argument("--nodes", type=int, default=5, help="[default: %(default)s]")
    parser.add_argument("--streams", type=int, default=4, help="answers at a time [default: %(default)s]")
    parser.add_argument("--stages", type=int, default=3, help="nodes in each chain [default: %(default)s]")
    parser.add_argument("--together", type=int, default=2, help="nodes away at once, at the most [default: %(default)s]")
    parser.add_argument("--keep", type=Path, help="leave the nodes' homes and logs in this directory")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if not 0 < options.together <= options.nodes - options.stages or options.nodes > NODES_MAX:
        parser.error(f"of {options.nodes} nodes {options.together} may be away, and {options.stages} are needed for a chain")
    if options.minutes <= 0 or options.streams < 1 or options.stages < 1:
        parser.error("--minutes, --streams and --stages are to be above 0")
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep} is there already")
    report = run(options.seed, options.minutes, options.nodes, options.streams, options.stages, options.together, options.keep)
    print(json.dumps(report.as_json()) if options.json else report.as_text())
    return 0 if report.held else 1


if __name__ == "__main__":
    sys.exit(main())
