"""The exact engine against what a user would take instead, on random weights of real shapes; decode over transformers leads.

Every comparison is measured in turn, round by round, with the same number of threads, and only one process computes at a time (but
for the two of the pipeline). A ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks import models
from scripts.benchmarks.engine_child import Child
from scripts.benchmarks.result import Result

PROMPT_TOKENS = 16
PREFILL_TOKENS = 128
REPLAY_TOKENS = 128
SESSIONS = 32
BATCH_TOKENS = 16
HEADLINE_SHAPE = "135m"
# Over transformers bf16, decode. The larger the model, the more of the time goes to memory, which both wait for.
DECODE_GOALS = {"135m": 4.0, "1b": 2.3}
Q8_DECODE_GOAL = 1.0
Q8_PREFILL_GOAL = 2.3
Q8_TORCH_GOALS = {"1b": 0.75}
SESSIONS_GOAL = 15.0
PIPELINE_GOALS = {1: 0.95, 2: 1.7}
REPLAY_GOAL = 1 / 20
# Logits of the same weights in another arithmetic. Q8_0 reaches 0.997 at 1B; with q and k in the wrong order it is 0.57.
SAME_MODEL_COSINE = 0.95

NO_LLAMA_CPP = "llama-cpp-python and gguf are not installed: run scripts/setup bench"
# Its own slower kernels, which it has without them, would be no measure.
LLAMA_CPP_FAILS = "llama.cpp does not run here; with GCC 12 its AMX kernels crash unless it is built by scripts/setup bench"

Part = dict[str, object]


@dataclass(frozen=True, slots=True)
class Options:
    shapes: tuple[str, ...]
    threads: tuple[int, ...]
    profile: str
    kernel: str
    rounds: int
    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", help=f"any of {', '.join(models.SHAPES)} [default: {','.join(DECODE_GOALS)}; quick: {HEADLINE_SHAPE}]"
    )
    parser.add_argument(
        "--threads", default="1,2", help="thread counts; the first is also that of the batch [default: %(default)s]"
    )
    parser.add_argument("--profile", default="exact", choices=("exact", "float"), help="of our engine [default: %(default)s]")
    parser.add_argument("--kernel", default="", help="of the exact profile, e.g. torch [default: what the engine chooses]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per comparison; the median counts [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per round [default: %(default)s]")


def run(arguments: argparse.Namespace) -> Result:
    quick = arguments.quick
    shapes = arguments.shapes.split(",") if arguments.shapes else [HEADLINE_SHAPE] if quick else [*DECODE_GOALS]
    options = Options(
        tuple(shapes),
        tuple([1] if quick else map(int, arguments.threads.split(","))),
        arguments.profile,
        arguments.kernel,
        min(arguments.rounds, 3) if quick else arguments.rounds,
        min(arguments.tokens, 16) if quick else arguments.tokens,
    )
    unknown = set(options.shapes) - models.SHAPES.keys()
    if unknown:
        raise SystemExit(f"unknown shapes: {', '.join(sorted(unknown))}; known are {', '.join(models.SHAPES)}")
    parts: dict[str, object] = {"profile": options.profile, "rounds": options.rounds, "tokens": options.tokens}
    measured = {name: _measure(name, options) for name in options.shapes}
    parts |= measured
    lead = HEADLINE_SHAPE if HEADLINE_SHAPE in measured else options.shapes[0]
    first: Any = measured[lead][f"{options.threads[0]}_threads"]
    goal = DECODE_GOALS.get(lead, DECODE_GOALS[HEADLINE_SHAPE])
    return Result("engine", first["decode_over_transformers_bf16"]["ratio"], goal, "higher", parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(name: str, options: Options) -> Part:
    from scripts.benchmarks import engine_store

    shape = models.SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="nexus-bench-engine-") as text:
        directory = Path(text)
        _say(f"{name}: making and converting {shape.weights / 1e6:.0f} M random weights")
        source = models.random_llama(directory / "model", shape)
        store = directory / "store"
        manifest = engine_store.add(source, store, options.profile)
        gguf, absent = _gguf(source, shape, directory / "model.gguf")
        bytes_per_token = engine_store.bytes_per_token(manifest) if options.profile == "exact" else None
        bench = _Bench(name, shape, options, source, store, bytes_per_token, gguf, absent)
        part: Part = {"million_weights": round(shape.weights / 1e6, 1)}
        for threads in options.threads:
            _say(f"{name}: decode and prefill, {threads} thread(s)")
            part[f"{threads}_threads"] = bench.compare(threads)
        _say(f"{name}: {SESSIONS} sessions, replay")
        part |= bench.sessions_and_replay(options.threads[0])
        _say(f"{name}: two processes")
        part |= bench.pipeline(engine_store.balanced_cut(manifest))
        return part


def _gguf(source: Path, shape: models.Shape, path: Path) -> tuple[Path | None, str | None]:
    """The weights for llama.cpp, or why it is left out."""
    if not (find_spec("llama_cpp") and find_spec("gguf")):
        return None, NO_LLAMA_CPP
    from scripts.benchmarks.engine_gguf import write_q8_0

    write_q8_0(source, shape, path)
    try:
        with Child("scripts.benchmarks.engine_sides", "llama_cpp", path, 1, threads=1) as side:
            side.ask("prefill", ids=[1] * PREFILL_TOKENS)
    except RuntimeError as error:
        _say(str(error))
        return None, LLAMA_CPP_FAILS
    return path, None


@dataclass(frozen=True, slots=True)
class _Bench:
    """One shape, with its weights on disk in the form that each side reads. `bytes_per_token`: that must be read to decode one,
    None for what the stage says. `absent`: why there is no GGUF file, if so."""

    name: str
    shape: models.Shape
    options: Options
    source: Path
    store: Path
    bytes_per_token: int | None
    gguf: Path | None
    absent: str | None

    def prompt(self, number: int, tokens: int) -> list[int]:
        """Random ids, the same ones for every side."""
        ids: list[int] = np.random.default_rng(number).integers(0, self.shape.vocabulary, tokens).tolist()
        return ids

    @contextmanager
    def sides(self, threads: int) -> Iterator[dict[str, Child]]:
        chosen: dict[str, tuple[object, ...]] = {"ours": ("engine", self.store, threads, self.options.kernel)}
        if self.options.profile == "exact":
            chosen["ours_torch"] = ("engine", self.store, threads, "torch")
        chosen["transformers_bf16"] = ("transformers", self.source, threads)
        if self.gguf is not None:
            chosen["q8_0"] = ("llama_cpp", self.gguf, threads)
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(Child("scripts.benchmarks.engine_sides", *arguments, threads=threads))
                for name, arguments in chosen.items()
            }

    def compare(self, threads: int) -> Part:
        with self.sides(threads) as sides:
            described, agreement = self._agreement(sides)
            prompt, long_prompt = self.prompt(1, PROMPT_TOKENS), self.prompt(2, PREFILL_TOKENS)
            for side in sides.values():
                side.ask("decode", prompt=prompt, tokens=4)
                side.ask("prefill", ids=long_prompt)
            decode = _rounds(sides, self.options.rounds, lambda side: side.ask("decode", prompt=prompt, tokens=self.options.tokens))
            prefill = _rounds(sides, self.options.rounds, lambda side: side.ask("prefill", ids=long_prompt))
        # What a token needs, not what a kernel keeps: copies in other forms are its own affair.
        weight_bytes = self.bytes_per_token or described["ours"]["weight_bytes"]
        with Child("scripts.benchmarks.engine_bandwidth", weight_bytes, threads, threads=threads) as reader:
            limit: float = reader.ask("read")["bytes_per_s"]
        reached = median(decode["ours"]) * weight_bytes
        no_torch = None if "ours_torch" in sides else "the float profile has one kernel"
        return {
            "decode_tokens_per_s": _medians(decode),
            f"prefill_{PREFILL_TOKENS}_tokens_per_s": _medians(prefill),
            "decode_over_transformers_bf16": _over(decode, "ours", "transformers_bf16", DECODE_GOALS.get(self.name)),
            "decode_over_q8_0": _over(decode, "ours", "q8_0", Q8_DECODE_GOAL, self.absent),
            f"prefill_{PREFILL_TOKENS}_over_q8_0": _over(prefill, "ours", "q8_0", Q8_PREFILL_GOAL, self.absent),
            "stock_torch_decode_over_q8_0": _over(
                decode, "ours_torch", "q8_0", Q8_TORCH_GOALS.get(self.name), self.absent or no_torch
            ),
            f"prefill_{PREFILL_TOKENS}_over_transformers_bf16": _over(prefill, "ours", "transformers_bf16", None),
            "q8_0_decode_over_transformers_bf16": _over(decode, "q8_0", "transformers_bf16", None, self.absent),
            "bandwidth": {
                "weight_bytes_per_token": weight_bytes,
                "reached_gb_per_s": round(reached / 1e9, 2),
                "machine_gb_per_s": round(limit / 1e9, 2),
                "share_of_limit": round(reached / limit, 3),
            },
            "logits_cosine_with_transformers_bf16": agreement,
            "kernels": {name: one["kernel"] for name, one in described.items() if "kernel" in one},
        }

    def _agreement(self, sides: Mapping[str, Child]) -> tuple[dict[str, Any], dict[str, float]]:
        """What each side says of itself, and how near its logits are to those of transformers. Raises RuntimeError where a side
        computes another model: its speed would mean nothing."""
        described, logits = {}, {}
        for name, side in sides.items():
            path = self.store / f"{name}.npy"
            described[name] = side.ask("save_logits", prompt=self.prompt(0, PROMPT_TOKENS), path=str(path))
            logits[name] = np.load(path)
        reference = logits.pop("transformers_bf16")
        agreement = {name: round(_cosine(values, reference), 6) for name, values in logits.items()}
        if wrong := [name for name, value in agreement.items() if value < SAME_MODEL_COSINE]:
            raise RuntimeError(f"{', '.join(wrong)} computes another model than transformers does: cosines {agreement}")
        return described, agreement

    def sessions_and_replay(self, threads: int) -> Part:
        prompts = [self.prompt(100 + number, PROMPT_TOKENS) for number in range(SESSIONS)]
        rounds = min(self.options.rounds, 3)
        part: Part = {}
        with Child("scripts.benchmarks.engine_sides", "engine", self.store, threads, self.options.kernel, threads=threads) as side:
            side.ask("batch", prompts=prompts, tokens=2)
            batches = [side.ask("batch", prompts=prompts, tokens=BATCH_TOKENS) for _ in range(rounds)]
            same = side.ask("same_batched", prompts=prompts, tokens=4)
            part[f"{SESSIONS}_sessions_over_one"] = {
                **_goal(median(one["together_tokens_per_s"] / one["alone_tokens_per_s"] for one in batches), SESSIONS_GOAL),
                "together_tokens_per_s": round(median(one["together_tokens_per_s"] for one in batches), 1),
                "alone_tokens_per_s": round(median(one["alone_tokens_per_s"] for one in batches), 1),
                "bit_identical_sessions": same["same"],
                "all_bit_identical": same["same"] == same["sessions"],
            }
            replays = [side.ask("replay", prompt=prompts[0], tokens=REPLAY_TOKENS) for _ in range(rounds)]
        part["replay_over_decode"] = {
            **_goal(median(one["replaying_s"] / one["decoding_s"] for one in replays), REPLAY_GOAL, "lower"),
            "same_bits": all(one["same_bits"] for one in replays),
        }
        return part

    def pipeline(self, cut: int) -> Part:
        """Two processes with one thread each over one process with one thread and one session."""
        prompts = [self.prompt(200 + number, PROMPT_TOKENS) for number in range(max(PIPELINE_GOALS))]
        tokens = self.options.tokens
        with ExitStack() as stack:
            whole = stack.enter_context(
                Child("scripts.benchmarks.engine_sides", "engine", self.store, 1, self.options.kernel, threads=1)
            )
            tail = stack.enter_context(
                Child("scripts.benchmarks.engine_pipeline", "tail", self.store, cut, self.options.kernel, threads=1)
            )
            head = stack.enter_context(
                Child(
                    "scripts.benchmarks.engine_pipeline",
                    "head",
                    self.store,
                    cut,
                    self.options.kernel,
                    tail.greeting["port"],
                    threads=1,
                )
            )

            def alone(number: int) -> dict[str, Any]:
                return whole.ask("decode", prompt=prompts[number], tokens=tokens)

            expected = [alone(number)["tokens"] for number in range(len(prompts))]
            head.ask("decode", prompts=prompts, tokens=4)
            rates: dict[int, list[float]] = {sessions: [] for sessions in PIPELINE_GOALS}
            same = True
            for _ in range(self.options.rounds):
                one_process = alone(0)["tokens_per_s"]
                for sessions in PIPELINE_GOALS:
                    answer = head.ask("decode", prompts=prompts[:sessions], tokens=tokens)
                    same = same and answer["tokens"] == expected[:sessions]
                    rates[sessions].append(answer["tokens_per_s"] / one_process)
        return {
            f"two_processes_{sessions}_session_over_one_process": {
                **_goal(median(rates[sessions]), goal),
                "cut_at_layer": cut,
                "same_tokens": same,
            }
            for sessions, goal in PIPELINE_GOALS.items()
        }


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _rounds(sides: Mapping[str, Child], rounds: int, ask: Callable[[Child], dict[str, Any]]) -> dict[str, list[float]]:
    """Tokens per second of every side in every round. The order turns round each time, so that a drift favours nobody."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            rates[name].append(ask(sides[name])["tokens_per_s"])
        order.reverse()
    return rates


def _medians(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: round(median(values), 2) for name, values in rates.items()}


def _over(rates: Mapping[str, Sequence[float]], one: str, other: str, goal: float | None, absent: str | None = None) -> Part:
    """The median of the rounds' ratios. `goal` None: told for information. `absent`: why it cannot be measured."""
    if absent is not None:
        return _missing(goal, "higher", absent)
    return _goal(median(a / b for a, b in zip(rates[one], rates[other], strict=True)), goal)


def _goal(ratio: float, goal: float | None, better: str = "higher") -> Part:
    if goal is None:
        return {"ratio": round(ratio, 4)}
    met = ratio >= goal if better == "higher" else ratio <= goal
    return {"ratio": round(ratio, 4), "goal": goal, "better": better, "met": met}


def _missing(goal: float | None, better: str, reason: str) -> Part:
    return {"ratio": None, "goal": goal, "better": better, "met": None, "reason": reason}
