"""The child process of the verification benchmark: one stage with all layers, and everything that is done to it timed in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT, layer_name
from nexus.engine.exact.commit import sealed
from nexus.engine.exact.freivalds import piece_keys
from nexus.engine.exact.replay import replay
from nexus.engine.exact.stage import ExactStage, open_pieces
from nexus.engine.exact.torch_step import quantise8, quantise16, split16
from nexus.engine.stage import Stage
from nexus.proof import freivalds
from nexus.proof.arithmetic.plan import LINEARS, trace_shape
from nexus.proof.receipts import SPEC, WINDOW, Receipt, SignedReceipt, payload_root, tokens_to_bytes
from nexus.proof.trace import WindowTrace
from scripts.benchmarks import engine_store
from scripts.benchmarks.engine_sides import Answer, claim_stdout, serve

# One window in so many is compared down to its op roots when a replica audits.
TRACED_WINDOWS = 8
_SESSION = leaf_hash(b"a session of a benchmark")


class Prover:
    """One session of a stage: it decodes greedily, and where it proves it seals and signs every window."""

    def __init__(self, stage: ExactStage, node: Identity, *, proves: bool) -> None:
        self.stage, self.node, self.proves = stage, node, proves
        self.name = b"proves" if proves else b"plain"
        self.shape = trace_shape(stage.plan, stage.start, stage.end)
        self.inputs: list[bytes] = []
        self.outputs: list[bytes] = []
        self.traces: list[WindowTrace] = []
        self.receipts: list[SignedReceipt] = []
        self.step_s: list[float] = []
        self.seal_s: list[float] = []
        self.kv_len = 0
        stage.close(self.name)
        stage.open(self.name, commit=proves)

    def step(self, payload: bytes) -> None:
        """Into `step_s` and `seal_s`: the seconds that the step took, and those of sealing and signing where a window is full."""
        began_s = perf_counter()
        self.inputs.append(payload)
        self.outputs.append(self.stage.step(self.name, payload))
        self.kv_len += len(payload) // 4
        self.step_s.append(perf_counter() - began_s)
        if self.proves and len(self.inputs) % WINDOW == 0:
            began_s = perf_counter()
            self._sign()
            self.seal_s.append(perf_counter() - began_s)

    @property
    def token_s(self) -> float:
        """Of a token but the first, which waits for the prompt: medians, since other programs hold up some of them."""
        return median(self.step_s[1:]) + (median(self.seal_s) / WINDOW if self.seal_s else 0.0)

    def _sign(self) -> None:
        window = sealed(self.stage.seal(self.name, WINDOW), self.shape, WINDOW)
        receipt = Receipt(
            spec=SPEC,
            profile=EXACT,
            parent=b"",
            model_root=_SESSION,
            session=_SESSION,
            node=self.node.public_key,
            stage=0,
            step0=len(self.inputs) - WINDOW,
            n=WINDOW,
            kv_len=self.kv_len,
            request=_SESSION,
            prev=self.receipts[-1].receipt.id if self.receipts else b"",
            in_root=payload_root(self.inputs[-WINDOW:]),
            out_root=payload_root(self.outputs[-WINDOW:]),
            kv_root=window.kv_root,
            trace_root=window.trace_root,
        )
        self.traces.append(window.trace)
        self.receipts.append(SignedReceipt.sign(receipt, self.node))


class Bench:
    def __init__(self, store: Path) -> None:
        stage: Stage = engine_store.load(store)
        assert isinstance(stage, ExactStage)
        self.stage, self.store = stage, store
        self.node = Identity(os.urandom(32))

    def overhead(self, prompt: list[int], tokens: int) -> Answer:
        """Two sessions of the same prompt in turn, token by token: what proving adds to a token, as a share of one without."""
        sides = [Prover(self.stage, self.node, proves=proves) for proves in (False, True)]
        payloads = [tokens_to_bytes(prompt)] * 2
        for number in range(tokens):
            # Who goes first changes, so that what the caches hold favours neither.
            for side in (0, 1) if number % 2 else (1, 0):
                sides[side].step(payloads[side])
            payloads = [side.outputs[-1] for side in sides]
        plain, proving = sides
        return {
            "ratio": proving.token_s / plain.token_s - 1,
            "plain_ms": 1e3 * plain.token_s,
            "proving_ms": 1e3 * proving.token_s,
            "sealing_and_signing_ms": 1e3 * (median(proving.seal_s) / WINDOW if proving.seal_s else 0.0),
            "same_tokens": plain.outputs == proving.outputs,
        }

    def audit(self, prompt: list[int], tokens: int) -> Answer:
        """A session without proofs, then what a replica does to check it: all outputs, every kv_root, one trace in eight."""
        proved = Prover(self.stage, self.node, proves=True)
        payload = tokens_to_bytes(prompt)
        for _ in range(tokens):
            proved.step(payload)
            payload = proved.outputs[-1]
        began_s = perf_counter()
        plain = Prover(self.stage, self.node, proves=False)
        payload = tokens_to_bytes(prompt)
        for _ in range(tokens):
            plain.step(payload)
            payload = plain.outputs[-1]
        decode_s = perf_counter() - began_s
        windows = range(0, len(proved.receipts), TRACED_WINDOWS)
        traced = [(number * WINDOW, WINDOW) for number in windows]
        began_s = perf_counter()
        done = replay(self.stage, proved.inputs, traces=traced)
        outputs_s = perf_counter() - began_s
        same = done.outputs == proved.outputs
        for signed in proved.receipts:
            receipt = signed.receipt
            same &= done.kv_root(done.kv_len(receipt.step0, receipt.n)) == receipt.kv_root
        roots = [sealed(trace, done.shape, WINDOW).trace_root for trace in done.traces(traced)]
        same &= roots == [proved.receipts[number].receipt.trace_root for number in windows]
        audit_s = perf_counter() - began_s
        return {
            "ratio": audit_s / decode_s,
            "of_it_passes": outputs_s / decode_s,
            "of_it_roots": (audit_s - outputs_s) / decode_s,
            "traced_windows": len(traced),
            "same": same,
            "trace_bytes_per_token": sum(len(trace.cells) + len(trace.logs) for trace in proved.traces)
            / max(1, len(proved.receipts) * WINDOW),
            "receipt_bytes": len(proved.receipts[-1].to_bytes()) if proved.receipts else 0,
        }

    def cell(self, prompt: list[int], repeats: int) -> Answer:
        """The products of one token and layer checked by keys, over the time that decoding gives to a layer's weights."""
        plan, manifest = self.stage.plan, self.stage.manifest
        index = manifest.layers // 2
        name = layer_name(index)
        pieces = open_pieces(plan, index, index + 1, engine_store.paths(self.store, manifest, index, index + 1))
        began_s = perf_counter()
        keys = piece_keys(pieces[name], LINEARS, os.urandom(freivalds.SEED_BYTES))
        making_s = perf_counter() - began_s
        inputs, sums = {}, {}
        random = np.random.default_rng(0)
        for linear in LINEARS:
            depth = keys.key(linear).depth
            inputs[linear], sums[linear] = _product(
                pieces[name].tensor(f"{linear}.weight"), random.standard_normal(depth), linear in plan.layers[index].wide
            )
        layer_bytes = sum(rows * depth for rows, depth in plan.linear_shapes().values())
        share = layer_bytes / engine_store.bytes_per_token(manifest)
        plain = Prover(self.stage, self.node, proves=False)
        check_s, right = [], True
        plain.step(tokens_to_bytes(prompt))
        for _ in range(repeats):
            plain.step(plain.outputs[-1])
            began_s = perf_counter()
            right &= all(freivalds.check(keys.key(linear), inputs[linear], sums[linear]) for linear in LINEARS)
            check_s.append(perf_counter() - began_s)
        return {
            "ratio": median(check_s) / (plain.token_s * share),
            "check_ms": 1e3 * median(check_s),
            "cell_ms": 1e3 * plain.token_s * share,
            "key_bytes": len(keys.to_bytes()),
            "weight_bytes": layer_bytes,
            "making_keys_s": making_s,
            "right": right,
        }

    def describe(self) -> Answer:
        return {"kernel": self.stage.kernel, "layers": self.stage.manifest.layers}


def _product(weight: NDArray[np.generic], x: NDArray[np.float64], wide: bool) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """Integers of a row, and their sums: in float64, exact."""
    row = torch.from_numpy(x.astype(np.float32))[None]
    integers = torch.cat(split16(quantise16(row)[0])) if wide else quantise8(row)[0]
    sums = integers.numpy().astype(np.float64) @ weight.astype(np.float64).T
    return integers.numpy(), sums.astype(np.int32)


def main(arguments: Sequence[str]) -> None:
    answer = claim_stdout()
    bench = Bench(Path(arguments[0]))
    operations = {"overhead": bench.overhead, "audit": bench.audit, "cell": bench.cell, "describe": bench.describe}
    serve(lambda operation, given: operations[operation](**given), answer)


if __name__ == "__main__":
    main(sys.argv[1:])
