"""The other side of `bench decode`: plain transformers, in one process of its own. Reads a token count per line, answers with JSON.

Usage: python -m scripts.benchmarks.plain MODEL_DIRECTORY THREADS PROMPT_IDS
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes, as a user's stream would show it. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    directory, threads, ids = sys.argv[1], int(sys.argv[2]), [int(part) for part in sys.argv[3].split(",")]
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    print("ready", flush=True)
    for line in sys.stdin:
        tokens = int(line)
        clock = _Clock()
        with torch.inference_mode():
            out = model.generate(
                prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock, pad_token_id=0
            )
        answer = out[0, len(ids) :].tolist()
        rate = (tokens - 1) / (clock.times[-1] - clock.times[1])
        print(json.dumps({"tokens": answer, "tokens_per_s": rate}), flush=True)


if __name__ == "__main__":
    main()
