"""A chain of stages is the whole model: the same tokens as transformers' `generate`, and the same bits in every logit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nexus.core.manifest import Manifest
from nexus.engine.stage import Stage, load_stage
from nexus.proof.receipts import tokens_from_bytes, tokens_to_bytes

from .conftest import ARCHITECTURES, Folder

Imported = Callable[..., tuple[Path, Manifest, Folder]]
PROMPT = [5, 17, 99, 3, 42, 64, 7]
NEW = 64
SESSION = b"s" * 32


def load_chain(manifest: Manifest, folder: Folder, count: int, dtype: str = "float32") -> list[Stage]:
    edges = [round(manifest.layers * i / count) for i in range(count + 1)]
    return [
        load_stage(manifest, start, end, folder.stage_files(manifest, start, end), dtype=dtype) for start, end in pairwise(edges)
    ]


def run(chain: list[Stage], payload: bytes, session: bytes = SESSION) -> bytes:
    tokens = len(payload) // 4
    for stage in chain:
        assert len(payload) == stage.input_size(tokens)
        payload = stage.step(session, payload)
        assert len(payload) == stage.output_size(tokens)
    return payload


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[list[int], list[torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    out = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
    )
    return out.sequences[0, len(PROMPT) :].tolist(), [logits[0].float() for logits in out.logits]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shards_are_the_whole_model(name: str, imported: Imported) -> None:
    directory, manifest, folder = imported(name)
    tokens, logits = reference(directory)
    for count in (1, 2, 3, 8):
        chain = load_chain(manifest, folder, count)
        assert all(stage.is_traced for stage in chain), "the fast way is not the same bits here"
        for stage in chain:
            stage.open(SESSION, None)
        payload = tokens_to_bytes(PROMPT)
        for step in range(NEW):
            payload = run(chain, payload)
            ours = torch.from_numpy(chain[-1].logits(SESSION))
            assert torch.equal(ours, logits[step]), f"{count} stages, step {step}: {(ours - logits[step]).abs().max()}"
            assert tokens_from_bytes(payload) == [tokens[step]]
