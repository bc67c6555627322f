"""What `bench engine` compares, each in a process of its own: exact (or float) stages, transformers, llama.cpp.

Usage: python -m scripts.benchmarks.engine_sides SIDE MODEL THREADS [KERNEL]. One request per line in, one answer per line out, both
JSON; `scripts.benchmarks.engine_child` is the other end. MODEL: the store of `engine_store`, a model directory, or a GGUF file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.engine_store import load

Answer = dict[str, object]
CONTEXT = 1024


class Side(Protocol):
    """One session at a time: `start` reads a prompt into an empty cache, `next` goes on. Both answer the greedy token."""

    def start(self, ids: Sequence[int]) -> int: ...

    def next(self, token: int) -> int: ...

    def logits(self) -> NDArray[np.float32]: ...

    def describe(self) -> Answer: ...


class StageSide:
    """Our engine, whole model in one stage. `variant`: the kernel, empty for the engine's own choice."""

    def __init__(self, store: Path, threads: int, variant: str) -> None:
        self.stage = load(store, kernel=variant or None)
        self._session = b""
        self._sessions = 0

    def open(self) -> bytes:
        self._sessions += 1
        session = self._sessions.to_bytes(16, "little")
        self.stage.open(session)
        return session

    def step(self, session: bytes, ids: Sequence[int]) -> int:
        return int.from_bytes(self.stage.step(session, np.array(ids, "<u4").tobytes()), "little")

    def start(self, ids: Sequence[int]) -> int:
        self.stage.close(self._session)
        self._session = self.open()
        return self.step(self._session, ids)

    def next(self, token: int) -> int:
        return self.step(self._session, [token])

    def logits(self) -> NDArray[np.float32]:
        return np.asarray(self.stage.logits(self._session), np.float32)

    def describe(self) -> Answer:
        return {"weight_bytes": self.stage.weight_bytes, "kernel": getattr(self.stage, "kernel", "transformers")}


class TransformersSide:
    """transformers in bfloat16 with its own cache; a bare loop, which is faster than `generate`."""

    def __init__(self, directory: Path, threads: int, variant: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    def start(self, ids: Sequence[int]) -> int:
        self._cache = None
        return self._pass(ids)

    def next(self, token: int) -> int:
        return self._pass([token])

    def _pass(self, ids: Sequence[int]) -> int:
        out = self._model(self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        self._logits = out.logits[0, -1]
        return int(self._logits.argmax())

    def logits(self) -> NDArray[np.float32]:
        return np.asarray(self._logits.float().numpy())

    def describe(self) -> Answer:
        return {"weight_bytes": sum(parameter.nbytes for parameter in self._model.parameters())}


class LlamaCppSide:
    """llama.cpp through the C interface of llama-cpp-python: no text, no sampler, no Python per layer."""

    def __init__(self, path: Path, threads: int, variant: str) -> None:
        import llama_cpp

        self._api = llama_cpp
        # Kept, or the callback would be freed under the library.
        self._quiet = llama_cpp.llama_log_callback(_ignore)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = CONTEXT
        context_params.n_threads = context_params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context_params) if self._model else None
        if not self._context:
            raise RuntimeError("llama.cpp cannot load the model")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def start(self, ids: Sequence[int]) -> int:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._pass(ids)

    def next(self, token: int) -> int:
        return self._pass([token])

    def _pass(self, ids: Sequence[int]) -> int:
        tokens = (self._api.llama_token * len(ids))(*ids)
        failed = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids)))
        if failed:
            raise RuntimeError(f"llama_decode answers {failed}")
        return int(self._view().argmax())

    def _view(self) -> NDArray[np.float32]:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, -1), (self._vocabulary,))

    def logits(self) -> NDArray[np.float32]:
        return self._view().copy()

    def describe(self) -> Answer:
        return {
            "weight_bytes": self._api.llama_model_size(self._model),
            "kernel": self._api.llama_print_system_info().decode(),
        }


def _ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def decode(side: Side, prompt: list[int], tokens: int) -> Answer:
    """Seconds for each token after the first, which waits for the prompt."""
    answer = [side.start(prompt)]
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        answer.append(side.next(answer[-1]))
    return {"tokens": answer, "tokens_per_s": (tokens - 1) / (time.perf_counter() - begin)}


def prefill(side: Side, ids: list[int]) -> Answer:
    begin = time.perf_counter()
    side.start(ids)
    return {"tokens_per_s": len(ids) / (time.perf_counter() - begin)}


def save_logits(side: Side, prompt: list[int], path: str) -> Answer:
    side.start(prompt)
    np.save(path, side.logits())
    return side.describe()


def replay(side: StageSide, prompt: list[int], tokens: int) -> Answer:
    """Decode `tokens` tokens, then read the same ones in one pass after the same prompt: an auditor's work."""
    first = side.start(prompt)
    fed = [first]
    begin = time.perf_counter()
    for _ in range(tokens):
        fed.append(side.next(fed[-1]))
    decoding_s = time.perf_counter() - begin
    decoded = side.logits().tobytes()
    side.start(prompt)
    begin = time.perf_counter()
    side.step(side._session, fed[:-1])
    replaying_s = time.perf_counter() - begin
    return {"decoding_s": decoding_s, "replaying_s": replaying_s, "same_bits": side.logits().tobytes() == decoded}


def batch(side: StageSide, prompts: list[list[int]], tokens: int) -> Answer:
    """Tokens per second of one session alone, and of all sessions together in batched steps."""
    alone = decode(side, prompts[0], tokens)["tokens_per_s"]
    sessions = [side.open() for _ in prompts]
    last = [side.step(session, ids) for session, ids in zip(sessions, prompts, strict=True)]
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        last = _step_many(side, sessions, last)
    together = len(prompts) * (tokens - 1) / (time.perf_counter() - begin)
    for session in sessions:
        side.stage.close(session)
    return {"alone_tokens_per_s": alone, "together_tokens_per_s": together}


def same_batched(side: StageSide, prompts: list[list[int]], tokens: int) -> Answer:
    """Whether every token and every logit of every session is the same bits in batched steps as in a run alone. Not timed."""
    sessions = [side.open() for _ in prompts]
    last = [side.step(session, ids) for session, ids in zip(sessions, prompts, strict=True)]
    together = [hashlib.blake2b() for _ in prompts]
    for _ in range(tokens):
        last = _step_many(side, sessions, last)
        for digest, session, token in zip(together, sessions, last, strict=True):
            _absorb(digest, side, session, token)
    same = 0
    for session, ids, expected in zip(sessions, prompts, together, strict=True):
        side.stage.close(session)
        alone, digest = side.open(), hashlib.blake2b()
        token = side.step(alone, ids)
        for _ in range(tokens):
            token = side.step(alone, [token])
            _absorb(digest, side, alone, token)
        side.stage.close(alone)
        same += digest.digest() == expected.digest()
    return {"same": same, "sessions": len(prompts)}


def _absorb(digest: hashlib.blake2b, side: StageSide, session: bytes, token: int) -> None:
    digest.update(token.to_bytes(4, "little"))
    digest.update(np.ascontiguousarray(side.stage.logits(session)).tobytes())


def _step_many(side: StageSide, sessions: list[bytes], tokens: list[int]) -> list[int]:
    answers = side.stage.step_many(
        [(session, token.to_bytes(4, "little")) for session, token in zip(sessions, tokens, strict=True)]
    )
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [int.from_bytes(answer, "little") for answer in answers]


SIDES: dict[str, Callable[[Path, int, str], Side]] = {
    "engine": StageSide,
    "transformers": TransformersSide,
    "llama_cpp": LlamaCppSide,
}
OPERATIONS: dict[str, Callable[..., Answer]] = {
    "decode": decode,
    "prefill": prefill,
    "save_logits": save_logits,
    "replay": replay,
    "batch": batch,
    "same_batched": same_batched,
}


def claim_stdout() -> Callable[[Answer], None]:
    """Standard output for answers alone, one per line; what libraries print there goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda answer: print(json.dumps(answer), file=answers, flush=True)


def serve(handle: Callable[[str, Answer], Answer], answer: Callable[[Answer], None]) -> None:
    """Answer requests until stdin ends."""
    answer({"ready": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        answer(handle(request.pop("do"), request))


def main() -> None:
    name, model, threads, *variant = sys.argv[1:]
    answer = claim_stdout()
    side = SIDES[name](Path(model), int(threads), variant[0] if variant else "")
    serve(lambda operation, arguments: OPERATIONS[operation](side, **arguments), answer)


if __name__ == "__main__":
    main()
