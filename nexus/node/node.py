"""The composition root: puts a node's parts together and answers whoever steers it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import structlog
import trio

from nexus.core.errors import NexusError, NotFoundError, UsageError
from nexus.core.keys import Identity, parse_peer_id
from nexus.core.manifest import Manifest
from nexus.models import BUILTIN_NAMES, builtin_path
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.transport import PeerAddress, Transport
from nexus.node.api import EmbedRequest, Event, GenerateRequest, ModelView, NodeStatus, PeerView, PlanView, Progress
from nexus.node.blobs import BlobService, Fetcher
from nexus.node.infer import InferService
from nexus.node.membership import Membership
from nexus.node.models import Models
from nexus.node.options import NodeOptions
from nexus.node.runner import Runner
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog, held_bytes, held_layers
from nexus.storage.home import Home, load_identity
from nexus.storage.peers import AddressBook
from nexus.swarm.membership import Holding, LayerRange, NodeRecord

log = structlog.get_logger("nexus.node")

VERSION = version("nexus-swarm")
PROGRESS_MAX = 64
SPEED_SIZE = 256
SPEED_ROUNDS = 16


class Node:
    """A running node; see `NodeApi` for what its methods promise."""

    def __init__(
        self, options: NodeOptions, identity: Identity, transport: Transport, book: AddressBook, nursery: trio.Nursery, speed: int
    ) -> None:
        self._options = options
        self._identity = identity
        self._transport = transport
        self._book = book
        self._speed = speed
        self._began_s = trio.current_time()
        home = Home(options.home)
        self._blobs = BlobStore.open(home.models, options.disk_max_bytes)
        self._catalog = Catalog.open(home.models)
        self._membership = Membership(transport, identity, self._describe, _now_ms)
        fetcher = Fetcher(transport, self._blobs, self._catalog)
        self._models = Models(
            self._catalog, self._blobs, fetcher, auto_fetch=options.auto_fetch, memory_max_bytes=options.memory_max_bytes
        )
        self._blob_service = BlobService(transport, self._blobs, self._catalog)
        self._infer = InferService(
            transport, identity, self._models, serve=options.serve, sessions_max=options.sessions_max
        )
        self._runner = Runner(
            transport, identity, self._models, self._membership.records, self._describe, nursery, options.sessions_max
        )
        self._add_lock = trio.Lock()
        self._draining = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._blob_service.start()
        self._infer.start()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._membership.run)
            task_status.started()
