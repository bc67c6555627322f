"""A chain of stages is the whole model: the same tokens as transformers' `generate`, and the same bits in every logit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus.core.errors import MalformedError, ModelFormatError, NotFoundError, UsageError
from nexus.core.manifest import Manifest
from nexus.engine.decoder_step import LLAMA_FORM
from nexus.engine.kv import KVLayer
from nexus.engine.stage import Stage, load_stage
from nexus.proof.arithmetic.sampler import Sampling
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
        assert all(stage.is_traced for stage in chain) == (name != "llama-dynamic"), "the fast way is not the same bits here"
        fused = any(name.startswith(prefix) for prefix in LLAMA_FORM) and name != "llama-dynamic"
        assert all(stage.is_fused for stage in chain) == fused, "the fused step is not the same bits here"
        for stage in chain:
            stage.open(SESSION, None)
        payload = tokens_to_bytes(PROMPT)
        for step in range(NEW):
            payload = run(chain, payload)
            ours = torch.from_numpy(chain[-1].logits(SESSION))
            assert torch.equal(ours, logits[step]), f"{count} stages, step {step}: {(ours - logits[step]).abs().max()}"
            assert tokens_from_bytes(payload) == [tokens[step]]


def generate(chain: list[Stage], session: bytes, steps: int, sampling: Sampling | None = None) -> list[int]:
    for stage in chain:
        stage.open(session, sampling)
    payload, tokens = tokens_to_bytes(PROMPT), []
    for _ in range(steps):
        payload = run(chain, payload, session)
        tokens += tokens_from_bytes(payload)
    for stage in chain:
        stage.close(session)
    return tokens


def test_stages_that_load_side_by_side_leave_transformers_as_it_was(imported: Imported) -> None:
    """It swaps functions of its own while it loads: once two loads in two threads had ended in the wrong order, no model of that
    process had its head tied any more."""
    from transformers import PreTrainedModel

    before = PreTrainedModel.tie_weights
    _, manifest, folder = imported("llama")
    files = folder.stage_files(manifest, 0, 1)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_stage(manifest, 0, 1, files), range(24)))
    assert len(loaded) == 24
    assert PreTrainedModel.tie_weights is before


def test_bfloat16_is_the_whole_model_too(imported: Imported) -> None:
    directory, manifest, folder = imported("llama")
    tokens, _ = reference(directory, torch.bfloat16)
    assert generate(load_chain(manifest, folder, 3, "bfloat16"), SESSION, NEW) == tokens


def test_sampling_depends_on_the_seed_alone(imported: Imported) -> None:
    _, manifest, folder = imported("llama")
    one, three = load_chain(manifest, folder, 1), load_chain(manifest, folder, 3)
    draw = Sampling(temperature=1.5, top_p=0.95, seed=11)
    tokens = generate(one, b"a", 32, draw)
    assert generate(three, b"b", 32, draw) == tokens
    assert generate(one, b"c", 32, Sampling(temperature=1.5, top_p=0.95, seed=12)) != tokens


def test_the_repetition_penalty_counts_the_answer(imported: Imported) -> None:
    _, manifest, folder = imported("llama")
    heavy = Sampling(repetition_penalty=100.0)
    tokens = generate(load_chain(manifest, folder, 1), b"a", NEW, heavy)
    assert generate(load_chain(manifest, folder, 3), b"b", NEW, heavy) == tokens
    assert len(set(tokens)) > len(set(generate(load_chain(manifest, folder, 1), b"c", NEW)))


def test_sessions_do_not_touch_each_other(imported: Imported) -> None:
    _, manifest, folder = imported("gemma3")
    chain = load_chain(manifest, folder, 2)
    alone = [generate(chain, b"x", 40, Sampling(1.0, 1.0, seed)) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: generate(chain, bytes([seed]), 40, Sampling(1.0, 1.0, seed)), range(4)))
    assert together == alone


def test_a_prompt_may_come_in_parts(imported: Imported) -> None:
    _, manifest, folder = imported("qwen3")
    chain = load_chain(manifest, folder, 2)
    for stage in chain:
        stage.open(b"whole")
        stage.open(b"parts")
    run(chain, tokens_to_bytes(PROMPT), b"whole")
    run(chain, tokens_to_bytes(PROMPT[:3]), b"parts")
    run(chain, tokens_to_bytes(PROMPT[3:]), b"parts")
    whole, parts = (torch.from_numpy(chain[-1].logits(session)) for session in (b"whole", b"parts"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_kv_bytes_grow_with_the_session_and_go_with_it(imported: Imported) -> None:
    _, manifest, folder = imported("llama")
    (stage,) = load_chain(manifest, folder, 1)
    stage.open(SESSION)
    assert stage.kv_bytes(SESSION) == 0
    stage.step(SESSION, tokens_to_bytes(PROMPT))
    held = stage.kv_bytes(SESSION)
    assert held >= len(PROMPT) * manifest.layers * manifest.kv_bytes
    stage.step(SESSION, tokens_to_bytes([1] * (manifest.context - len(PROMPT))))
    assert stage.kv_bytes(SESSION) == manifest.context * manifest.layers * manifest.kv_bytes
    stage.close(SESSION)
    with pytest.raises(NotFoundError):
        stage.kv_bytes(SESSION)


def test_bad_payloads_are_refused_and_change_nothing(imported: Imported) -> None:
    _, manifest, folder = imported("llama")
    first, last = load_chain(manifest, folder, 2)
    for stage in (first, last):
        stage.open(SESSION)
    hidden = first.step(SESSION, tokens_to_bytes(PROMPT))
    token = last.step(SESSION, hidden)
    for payload in (b"", b"abc", tokens_to_bytes([manifest.vocab_size]), b"\xff" * 4):
        with pytest.raises(MalformedError):
            first.step(SESSION, payload)
    width = last.input_size(1)
    nan, inf = np.full(width // 4, np.nan, "<f4").tobytes(), np.full(width // 4, np.inf, "<f4").tobytes()
    for payload in (b"", hidden[:-4], bytes(width + 4), nan, inf):
        with pytest.raises(MalformedError):
            last.step(SESSION, payload)
    for stage, unit in ((first, 4), (last, width)):
        with pytest.raises(UsageError, match="context"):
            stage.step(SESSION, bytes(unit * (manifest.context - len(PROMPT) + 1)))
        with pytest.raises(NotFoundError):
            stage.step(b"another", bytes(unit))
        with pytest.raises(UsageError, match="open already"):
            stage.open(SESSION)
    following = last.step(SESSION, first.step(SESSION, token))
    assert following == tokens_to_bytes(generate(load_chain(manifest, folder, 1), b"clean", 2)[1:])


def test_a_step_that_fails_half_way_can_be_repeated(imported: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, folder = imported("llama")
    (stage,) = load_chain(manifest, folder, 1)
    stage.open(SESSION)
    prompt = tokens_to_bytes(PROMPT)
    with monkeypatch.context() as patch:
        updates = iter(range(5))
        original = KVLayer.update

        def fail_later(self: KVLayer, *args: object, **kwargs: object) -> object:
            if next(updates, None) is None:
                raise RuntimeError("out of memory")
            return original(self, *args, **kwargs)  # type: ignore[arg-type]

        patch.setattr(KVLayer, "update", fail_later)
        with pytest.raises(RuntimeError):
            stage.step(SESSION, prompt)
    assert stage.step(SESSION, prompt) == tokens_to_bytes(generate(load_chain(manifest, folder, 1), b"clean", 1))


def test_loading_needs_its_own_files_and_no_network(imported: Imported, monkeypatch: pytest.MonkeyPatch) -> None:
    _, manifest, folder = imported("llama")

    def refuse(*args: object) -> None:
        raise AssertionError("loading a stage opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    files = folder.stage_files(manifest, 2, 5)
    assert set(files) >= {"layer.2", "layer.3", "layer.4"}
    assert not set(files) & {"embedding", "head", "layer.1", "layer.5"}
    load_stage(manifest, 2, 5, files)
    with pytest.raises(NotFoundError, match=r"layer\.1"):
        load_stage(manifest, 1, 5, files)
    with pytest.raises(UsageError):
        load_stage(manifest, 5, 9, files)
    with pytest.raises(UsageError):
        load_stage(manifest, 2, 5, files, dtype="float8")


def test_files_that_do_not_make_the_model_are_refused(imported: Imported, tmp_path: Path) -> None:
    _, manifest, folder = imported("llama")
    files = folder.stage_files(manifest, 0, 2)
    cut = tmp_path / "cut"
    cut.write_bytes(files["layer.0"].read_bytes()[:-4])
    with pytest.raises(ModelFormatError, match="safetensors"):
        load_stage(manifest, 0, 2, {**files, "layer.0": cut})
    with pytest.raises(ModelFormatError, match="does not hold"):
        load_stage(manifest, 0, 2, {**files, "layer.0": files["embedding"]})
    with pytest.raises(ModelFormatError, match="different models"):
        load_stage(dataclasses.replace(manifest, vocab_size=130), 0, 2, files)
    with pytest.raises(ModelFormatError, match="different models"):
        load_stage(dataclasses.replace(manifest, context=1 << 20), 0, 2, files)
    hostile = tmp_path / "config.json"
    hostile.write_text(json.dumps({**json.loads(files["config.json"].read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ModelFormatError, match="code"):
        load_stage(manifest, 0, 2, {**files, "config.json": hostile})
