"""Exact against float: the float side is transformers' model, the figures are what they say, what cannot be compared says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nexus.core.errors import ModelFormatError, UsageError
from nexus.core.fidelity import Fidelity
from nexus.core.manifest import CAUSAL, ENCODER, FLOAT, Manifest
from nexus.engine.exact.fidelity import NEAREST, WINDOW_TOKENS, _Likelihood, _with_vectors, measure, split_texts
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage
from nexus.models import MINILM, NANO, builtin_path, held_out_text
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS

Compare = Callable[..., Fidelity]
TEXTS = "\n\n".join("".join(chr(97 + (7 * i + j * j) % 26) for j in range(10 + i)) for i in range(8))


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Manifest, Folder]]:
    done: dict[str, tuple[Manifest, Folder]] = {}

    def take(name: str) -> tuple[Manifest, Folder]:
        if name not in done:
            folder = Folder(tmp_path_factory.mktemp(name))
            done[name] = import_model(builtin_path(name), folder, lambda *_: None, profile="exact"), folder
        return done[name]

    return take


def compared(model: tuple[Manifest, Folder], source: Path, text: str, **options: object) -> Fidelity:
    manifest, folder = model
    return measure(manifest, folder.paths, source, text, "text", lambda *_: None, **options)  # type: ignore[arg-type]


def part(text: str, count: int, *, causal: bool) -> str:
    return ("\n\n" if causal else "\n").join(split_texts(text, causal=causal)[:count])


def test_nano_is_close_to_float(builtin: Callable[[str], tuple[Manifest, Folder]]) -> None:
    told: list[tuple[str, int, int]] = []
    manifest, folder = builtin(NANO)
    text = part(held_out_text(CAUSAL)[1], 24, causal=True)
    report = measure(manifest, folder.paths, builtin_path(NANO), text, "text", lambda *event: told.append(event))
    assert report.top1_agreement is not None
    assert report.top1_agreement >= 0.98  # the goal is 0.99 on all of the text; this is a fifth of it
    assert report.perplexity_ratio is not None
    assert 0.99 <= report.perplexity_ratio <= 1.01
    assert [layer.name for layer in report.layers] == ["embedding", *(f"layer.{i}" for i in range(manifest.layers)), "head"]
    assert report.worst_layer.error == max(layer.error for layer in report.layers) < 0.05
    assert (report.texts, report.windows, report.cosine_mean) == (24, 24, None)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] == (builtin_path(NANO) / "model.safetensors").stat().st_size - _header(NANO)


def _header(name: str) -> int:
    return 8 + int.from_bytes((builtin_path(name) / "model.safetensors").read_bytes()[:8], "little")


def test_minilm_is_close_to_float(builtin: Callable[[str], tuple[Manifest, Folder]]) -> None:
    report = compared(builtin(MINILM), builtin_path(MINILM), part(held_out_text(ENCODER)[1], 60, causal=False))
    assert report.cosine_mean is not None
    assert report.cosine_mean >= 0.999
    assert report.cosine_worst is not None
    assert report.cosine_worst >= 0.995
    assert report.overlap is not None
    assert report.overlap >= 0.95
    assert (report.texts, report.top1_agreement) == (60, None)


def test_the_vectors_compared_are_those_that_the_stages_give(
    builtin: Callable[[str], tuple[Manifest, Folder]], tmp_path: Path
) -> None:
    """The same cosines, by whole stages of both profiles."""
    manifest, folder = builtin(MINILM)
    lines = split_texts(held_out_text(ENCODER)[1], causal=False)[: NEAREST + 1]
    report = compared((manifest, folder), builtin_path(MINILM), "\n".join(lines))
    plain = Folder(tmp_path)
    float_manifest = import_model(builtin_path(MINILM), plain, lambda *_: None, profile="float")
    vectors = []
    for one, files in ((manifest, folder.paths), (float_manifest, plain.paths)):
        from nexus.engine.tokenizer import Tokenizer

        stage, tokenizer = load_stage(one, 0, one.layers, files), Tokenizer.load(files, WINDOW_TOKENS)
        made = []
        for number, line in enumerate(lines):
            session = bytes([number]) * 16
            stage.open(session)
            answer = stage.step(session, np.array(tokenizer.encode(line), "<u4").tobytes())
            made.append(np.frombuffer(answer, "<f4").astype(np.float64))
        vectors.append(np.stack(made))
    exact, true = vectors
    cosines = (exact * true).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(true, axis=1)
    assert report.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert report.cosine_worst == pytest.approx(cosines.min(), abs=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_float_side_is_transformers_model(
    make_model: Callable[..., Path], exact_model: Callable[[str], tuple[Manifest, Folder]], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    architecture, options = VARIANTS[name]
    directory = make_model(architecture, num_hidden_layers=LAYERS, **options)
    manifest, folder = exact_model(name)
    report = compared((manifest, folder), directory, TEXTS)
    from nexus.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder.paths)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for text in split_texts(TEXTS, causal=True):
            ids = torch.tensor(tokenizer.encode(text))
            logits = model(ids[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    assert report.perplexity_float == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-4)
    # Random weights: far worse than trained ones, but every part is the part that it should be.
    assert report.worst_layer.error < 0.25


def test_every_kernel_gives_the_same_report(
    make_model: Callable[..., Path], exact_model: Callable[..., tuple[Manifest, Folder]]
) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    reports = [compared(exact_model("llama"), directory, TEXTS, kernel=kernel) for kernel in (None, "torch")]
    assert replace(reports[0], kernel="") == replace(reports[1], kernel="")


def test_long_texts_become_windows(make_model: Callable[..., Path], exact_model: Callable[..., tuple[Manifest, Folder]]) -> None:
    directory = make_model("llama", num_hidden_layers=LAYERS)
    report = compared(exact_model("llama"), directory, "abcdefgh" * 40 + "\n\n" + "a" * 129)  # a context of 128
    # The last token of the second text stands alone: it predicts nothing.
    assert (report.texts, report.windows, report.tokens) == (2, 4, 320 + 128)


def test_what_cannot_be_compared_says_so(
    builtin: Callable[[str], tuple[Manifest, Folder]], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    nano = builtin(NANO)
    with pytest.raises(UsageError, match="too few"):
        compared(nano, builtin_path(NANO), "Hello")
    with pytest.raises(UsageError, match="too few"):
        compared(builtin(MINILM), builtin_path(MINILM), "\n".join(f"line {i}" for i in range(NEAREST)))
    with pytest.raises(UsageError, match="float profile"):
        measure(replace(nano[0], profile=FLOAT), nano[1].paths, builtin_path(NANO), "x", "x", lambda *_: None)
    with pytest.raises(ModelFormatError, match="not a directory"):
        compared(nano, tmp_path / "gone", "x")
    with pytest.raises(ModelFormatError, match="another model"):
        compared(nano, make_model("llama"), "x")


def test_damaged_float_weights_are_no_success(builtin: Callable[[str], tuple[Manifest, Folder]], tmp_path: Path) -> None:
    for path in builtin_path(NANO).glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(builtin_path(NANO) / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match="not numbers"):
        compared(builtin(NANO), tmp_path, part(held_out_text(CAUSAL)[1], 3, causal=True))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 9), vocab=st.integers(1, 40), block=st.integers(1, 40))
def test_likelihood_in_blocks_is_that_of_the_whole(seed: int, rows: int, vocab: int, block: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 30, (rows, vocab)).astype(np.float32))
    targets = random.integers(0, vocab, rows)
    whole = _Likelihood(targets)
    whole.see(slice(0, rows), 0, logits)
    parts = _Likelihood(targets)
    for first in range(0, vocab, block):
        parts.see(slice(0, rows), first, logits[:, first : first + block])
    assert parts.best.tolist() == whole.best.tolist() == logits.numpy().argmax(axis=1).tolist()
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(targets))
    for one in (whole, parts):
        assert math.log(one.perplexity()) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def test_equal_vectors_overlap_wholly_and_opposite_ones_not() -> None:
    vectors = np.random.default_rng(1).normal(size=(40, 8))
    empty = Fidelity("", "", 0, 0, 0, "", ())
    same = _with_vectors(empty, vectors, 3 * vectors)
    assert same.cosine_worst == pytest.approx(1)
    assert same.overlap == 1.0
    other = _with_vectors(empty, vectors, -vectors)
    assert other.cosine_mean == pytest.approx(-1)
    assert _with_vectors(empty, vectors, vectors[::-1].copy()).overlap < 1  # type: ignore[operator]


def test_texts_are_split_by_blank_lines_or_by_lines() -> None:
    content = "a\nb\r\n \r\n\nc\n\n\n"
    assert split_texts(content.replace("\r\n", "\n"), causal=True) == ["a\nb", "c"]
    assert split_texts(content, causal=True) == ["a\nb", "c"]
    assert split_texts("a\n\nb\na\n", causal=False) == ["a", "b"]


def test_the_default_texts_are_what_they_say() -> None:
    from scripts.fidelity_texts import COUNT, held_out

    name, text = held_out_text(CAUSAL)
    assert (name, text) == ("held_out.txt", held_out())
    sentences = split_texts(held_out_text(ENCODER)[1], causal=False)
    assert len(sentences) == COUNT == len(held_out_text(ENCODER)[1].splitlines())


def test_a_report_is_json(builtin: Callable[[str], tuple[Manifest, Folder]]) -> None:
    from nexus.storage.notes import ModelNotes

    report = compared(builtin(NANO), builtin_path(NANO), part(held_out_text(CAUSAL)[1], 3, causal=True))
    notes = ModelNotes("nano", report)
    assert ModelNotes.from_bytes(notes.to_bytes()) == notes
    assert json.loads(notes.to_bytes())["fidelity"]["texts"] == 3
