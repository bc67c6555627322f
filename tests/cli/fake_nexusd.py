"""nexusd with a node that has no network: everything around the node is real. Run as a script, with nexusd's arguments.

FAKE_NODE steers it: "fail" and "crash" do not open, "hang" never finishes opening, "stuck" never drains.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import trio

from nexus.core.errors import LocalError
from nexus.node.options import NodeOptions
from tests.gateway.fake_node import FakeNode


@asynccontextmanager
async def open_node(options: NodeOptions) -> AsyncIterator[FakeNode]:
    match os.environ.get("FAKE_NODE"):
        case "fail":
            raise ExceptionGroup("nursery", [LocalError("port 4510 is taken", "Set network.listen to another port")])
        case "crash":
            raise ZeroDivisionError("a bug")
        case "hang":
            print("opening", file=sys.stderr, flush=True)
            await trio.sleep_forever()
    node = FakeNode()
    node.name = options.name
    if os.environ.get("FAKE_NODE") == "stuck":
        node.running = 1
    try:
        yield node
    finally:
        print(f"closed, drained: {node.drained}", file=sys.stderr, flush=True)


fake = types.ModuleType("nexus.node.node")
fake.open_node = open_node  # type: ignore[attr-defined]
sys.modules["nexus.node.node"] = fake

if __name__ == "__main__":
    from nexus_cli.daemon import main

    main()
