"""The model of the simulation and all that is computed with it: a small random Llama in the exact profile, by the real engine.

Work is kept by what went in: a session of the same prompt over the same kinds of nodes is computed once, whoever runs it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nexus.core.hashing import HASH_BYTES, leaf_hash, tagged_hash
from nexus.core.manifest import EXACT_PLAN, Manifest
from nexus.engine.exact.audit import StageWeights, auditor_keys, read_piece_keys
from nexus.engine.exact.replay import Replay, replay
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.tampering import TAMPERINGS, load_tampered_stage
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage
from nexus.proof.arithmetic.plan import plan_from_json, trace_shape
from nexus.proof.audit_check import AuditorKeys
from nexus.proof.audit_open import Shown
from nexus.proof.receipts import tokens_to_bytes
from nexus.proof.trace import CELL_BYTES, TraceShape, WindowTrace
from nexus.storage.blobs import BlobStore

LAYERS, HIDDEN, VOCABULARY = 6, 32, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
STAGES = ((0, 2), (2, 4), (4, 6))
PROMPTS, PROMPT_TOKENS = 32, 10
STEPS, WINDOW = 4, 2
WINDOWS = tuple((step, WINDOW) for step in range(0, STEPS, WINDOW))
TOKENS = PROMPT_TOKENS + STEPS - 1
HONEST = "honest"
# Beside `TAMPERINGS`, which compute with something else: what a cheater does to what it computed honestly.
RANDOM, LAZY, ONE_BIT, FORGED, REWRITTEN = "random-output", "lazy-copy", "one-bit", "forged-trace", "rewritten-log"
KEPT = 4096


@dataclass(frozen=True, slots=True)
class Work:
    """What one stage did in one session: `inputs`, `outputs` per step; `traces` per window."""

    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    traces: tuple[WindowTrace, ...]


class _Shown:
    """A cheater's own computation, with the honest input of its first layer."""

    def __init__(self, own: Replay, honest: Replay) -> None:
        self._own = own
        self.stage_input = honest.stage_input

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class Model:
    """The model on disk in `directory`, made anew, and its stages, honest and not."""

    def __init__(self, directory: Path) -> None:
        source = directory / "source"
        source.mkdir()
        _write(source)
        blobs = BlobStore.open(directory / "blobs")
        self.manifest: Manifest = import_model(source, blobs, lambda *_: None)
        self._files = {blob.name: blobs.path(blob.root) for blob in (*self.manifest.pieces, *self.manifest.files)}
        self.exact_json = self._files[EXACT_PLAN].read_bytes()
        self.exact = plan_from_json(self.exact_json)
        self.weights = StoredWeights(lambda root: (self.manifest, self._files))
        generator = np.random.default_rng(2)
        self.prompts = [
            tokens_to_bytes(int(token) for token in generator.integers(VOCABULARY, size=PROMPT_TOKENS)) for _ in range(PROMPTS)
        ]
        # Kept per model, not per process: a method's cache would keep the model alive.
        self.session = lru_cache(maxsize=KEPT)(self._session)
        self.shown = lru_cache(maxsize=KEPT)(self._shown)
        self.keys = lru_cache(maxsize=None)(self._keys)
        self.recomputed = lru_cache(maxsize=KEPT)(self._recomputed)
        self._stage = lru_cache(maxsize=None)(self._load)

    def shape(self, stage: int) -> TraceShape:
        return trace_shape(self.exact, *STAGES[stage])

    @cached_property
    def answers(self) -> list[tuple[bytes, ...]]:
        """What honest nodes answer to each prompt, step by step."""
        return [self.session((HONEST,) * len(STAGES), prompt)[-1].outputs for prompt in range(PROMPTS)]

    def is_false(self, act: str, stage: int, work: Work) -> bool:
        """Whether a stage that acted so gave or committed to anything but what honest nodes do for the same inputs."""
        if act == HONEST:
            return False
        honest = self.recomputed(stage, work.inputs)
        return tuple(honest.outputs) != work.outputs or tuple(honest.trace(*window) for window in WINDOWS) != work.traces

    def _load(self, act: str, stage: int) -> ExactStage:
        start, end = STAGES[stage]
        if act in TAMPERINGS:
            return load_tampered_stage(TAMPERINGS[act], self.manifest, start, end, self._files)
        loaded = load_stage(self.manifest, start, end, self._files)
        assert isinstance(loaded, ExactStage)
        return loaded

    def _recomputed(self, stage: int, inputs: tuple[bytes, ...]) -> Replay:
        """What an auditor gets who computes it all again from these inputs."""
        return replay(self._stage(HONEST, stage), inputs, None, WINDOWS)

    def _shown(self, act: str, stage: int, inputs: tuple[bytes, ...]) -> Shown:
        """What a stage that acts so shows of its work: what it computed, on the embedding as everybody knows it."""
        if act not in TAMPERINGS:
            return self.recomputed(stage, inputs)
        return _Shown(replay(self._stage(act, stage), inputs, None, WINDOWS), self.recomputed(stage, inputs))

    @cached_property
    def stage_weights(self) -> StageWeights:
        return StageWeights(self.manifest, self.exact, self._files)

    def _keys(self, pieces: tuple[tuple[str, tuple[str, ...]], ...]) -> AuditorKeys:
        """Freivalds' keys of these pieces."""
        made = {
            name: read_piece_keys(self._files[name], self.exact, name, linears, tagged_hash("simulated keys", name.encode()))
            for name, linears in pieces
        }
        return auditor_keys(self.exact, self._files, made)

    def _session(self, acts: tuple[str, ...], prompt: int) -> tuple[Work, ...]:
        """A whole session over stages that act so, round the ring as the real one goes."""
        session = b"simulation"
        stages = [self._stage(act if act in TAMPERINGS else HONEST, number) for number, act in enumerate(acts)]
        inputs: list[list[bytes]] = [[] for _ in stages]
        outputs: list[list[bytes]] = [[] for _ in stages]
        for stage in stages:
            stage.open(session)
        payload = self.prompts[prompt]
        for _ in range(STEPS):
            for number, (act, stage) in enumerate(zip(acts, stages, strict=True)):
                inputs[number].append(payload)
                payload = _altered(act, stage.step(session, payload), payload, outputs[number], last=stage.last)
                outputs[number].append(payload)
        for stage in stages:
            stage.close(session)
        return tuple(
            Work(tuple(inputs[number]), tuple(outputs[number]), self._traces(act, number, inputs[number], outputs[number]))
            for number, act in enumerate(acts)
        )

    def _traces(self, act: str, stage: int, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> tuple[WindowTrace, ...]:
        if act in TAMPERINGS:
            done = replay(self._stage(act, stage), tuple(inputs), None, WINDOWS)
        else:
            done = self.recomputed(stage, tuple(inputs))
        traces = [done.trace(*window) for window in WINDOWS]
        if act == FORGED:
            return tuple(replace(trace, cells=_scrambled(trace.cells)) for trace in traces)
        if act == REWRITTEN:
            return tuple(replace(trace, logs=_scrambled(trace.logs)) for trace in traces)
        if act == ONE_BIT and stage < len(STAGES) - 1:
            return tuple(
                self._with_outputs(trace, stage, outputs[step0 : step0 + n])
                for trace, (step0, n) in zip(traces, WINDOWS, strict=True)
            )
        return tuple(traces)

    def _with_outputs(self, trace: WindowTrace, stage: int, outputs: Sequence[bytes]) -> WindowTrace:
        """A trace that commits to these outputs instead, where a step has one token."""
        shape, cells = self.shape(stage), bytearray(trace.cells)
        for step, output in enumerate(outputs):
            if len(output) == 4 * HIDDEN:
                end = step * shape.step_bytes + shape.layers * CELL_BYTES
                cells[end - HASH_BYTES : end] = leaf_hash(output)
        return replace(trace, cells=bytes(cells))


def _altered(act: str, output: bytes, payload: bytes, before: Sequence[bytes], *, last: bool) -> bytes:
    """What a stage gives in place of its honest output. `before`: what it gave for earlier steps."""
    if act == RANDOM:
        return _made_up(output, payload, last=last)
    if act == LAZY and before and len(before[-1]) == len(output):
        return before[-1]
    if act == ONE_BIT and (last or len(output) == 4 * HIDDEN):
        return bytes([output[0] ^ 1]) + output[1:]
    return output


def _made_up(output: bytes, payload: bytes, *, last: bool) -> bytes:
    stream = blake3(payload).digest(len(output))
    if last:
        return (int.from_bytes(stream, "little") % VOCABULARY).to_bytes(4, "little")
    return (np.frombuffer(stream, np.int8)[: len(output) // 4].astype("<f4") / 32).tobytes()


def _scrambled(hashes: bytes) -> bytes:
    return b"".join(leaf_hash(hashes[at : at + HASH_BYTES]) for at in range(0, len(hashes), HASH_BYTES))


def _write(directory: Path) -> None:
    """A Hugging Face directory of random weights, the same every time."""
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (generator.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        return values

    head = int(CONFIG["head_dim"])  # type: ignore[call-overload]
    heads, kv_heads, ffn = (int(CONFIG[name]) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))  # type: ignore[call-overload]
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN) * 4, "lm_head.weight": normal(VOCABULARY, HIDDEN)}
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": normal(heads * head, HIDDEN),
            f"{at}.self_attn.k_proj.weight": normal(kv_heads * head, HIDDEN),
            f"{at}.self_attn.v_proj.weight": normal(kv_heads * head, HIDDEN),
            f"{at}.self_attn.o_proj.weight": normal(HIDDEN, heads * head),
            f"{at}.mlp.gate_proj.weight": normal(ffn, HIDDEN),
            f"{at}.mlp.up_proj.weight": normal(ffn, HIDDEN),
            f"{at}.mlp.down_proj.weight": normal(HIDDEN, ffn),
            f"{at}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{at}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    words = {f"w{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
