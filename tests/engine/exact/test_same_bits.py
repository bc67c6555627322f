"""However a text is computed, the bits are the same: at once, in parts or token by token, alone or beside others, in any number of
stages, on one thread or two, by every kernel, and under every instruction set that the libraries can be told to keep to."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus.core.manifest import Manifest
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage
from nexus.proof.receipts import tokens_to_bytes
from tests.engine.conftest import Folder
from tests.engine.exact.conftest import LAYERS, VARIANTS, Models, chain, kernels

# 11 variants: 2,200 cases in all.
CASES = 200
REFERENCE = "torch:float32 blocks"
SETTINGS = [
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "OMP_NUM_THREADS": "2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "2"},
]
SAMPLE = [5, 17, 99, 3, 42, 64, 7, *range(100, 130), *range(3, 20)]

Text = tuple[int, ...]


def read(stages: Sequence[Stage], text: Text, parts: Sequence[int], session: bytes = b"s", beside: Sequence[Text] = ()) -> bytes:
    """The bytes of the logits after `text`, read in parts; each step shared with one of every text in `beside`."""
    for stage in stages:
        stage.open(session)
        for number in range(len(beside)):
            stage.open(b"%d" % number)
    at = 0
    for step, count in enumerate(parts):
        batch = [(session, tokens_to_bytes(text[at : at + count]))]
        batch += [(b"%d" % n, tokens_to_bytes(other[step : step + 1])) for n, other in enumerate(beside) if step < len(other)]
        at += count
        for stage in stages:
            answers = stage.step_many(batch)
            batch = [(name, answer) for (name, _), answer in zip(batch, answers, strict=True) if isinstance(answer, bytes)]
            assert len(batch) == len(answers)
    logits = stages[-1].logits(session).tobytes()
    for stage in stages:
        stage.close(session)
        for number in range(len(beside)):
            stage.close(b"%d" % number)
    return logits


@st.composite
def texts(draw: st.DrawFn) -> tuple[Text, list[int], list[Text]]:
    """A text, the parts to read it in, and other sessions' texts."""
    token = st.integers(0, 130)
    text = tuple(draw(st.lists(token, min_size=1, max_size=48)))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6)) - {len(text)})
    edges = [0, *cuts, len(text)] if len(text) > 1 else [0, 1]
    others = draw(st.lists(st.lists(token, min_size=1, max_size=4).map(tuple), max_size=3))
    return text, [b - a for a, b in pairwise(edges)], others


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_gives_the_same_bits(name: str, exact_model: Models) -> None:
    model = exact_model(name)

    @cache
    def stages(count: int, kernel: str) -> list[Stage]:
        return chain(model, count, kernel)

    @given(texts(), st.integers(1, LAYERS), st.sampled_from(kernels()), st.sampled_from([1, 2]))
    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    def check(given: tuple[Text, list[int], list[Text]], count: int, kernel: str, threads: int) -> None:
        text, parts, beside = given
        torch.set_num_threads(threads)
        expected = read(stages(1, REFERENCE), text, [len(text)])
        assert read(stages(count, kernel), text, parts, beside=beside) == expected

    try:
        check()
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exact_minilm(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:
    folder = Folder(tmp_path_factory.mktemp("minilm-exact"))
    return import_model(minilm, folder, lambda *_: None, profile="exact"), folder


def test_an_encoder_gives_the_same_bits_by_every_kernel_and_in_any_number_of_stages(
    exact_minilm: tuple[Manifest, Folder],
) -> None:
    vectors: dict[tuple[int, ...], set[bytes]] = {}
    for kernel in kernels():
        for count in (1, 2, 6):
            stages = chain(exact_minilm, count, kernel)
            for text in ((101, 102), (101, 7592, 2088, 102), tuple(range(1000, 1100))):
                payload = tokens_to_bytes(text)
                for stage in stages:
                    stage.open(b"s")
                    payload = stage.step(b"s", payload)
                    stage.close(b"s")
                vectors.setdefault(text, set()).add(payload)
    assert all(len(found) == 1 for found in vectors.values())


def digests(model: tuple[Manifest, Folder]) -> dict[str, str]:
    """Of a text's logits, by every kernel that is right here."""
    from nexus.core.errors import LocalError

    found = {}
    for kernel in kernels():
        try:
            stages = chain(model, 1, kernel)
        except LocalError as error:
            found[kernel] = f"refused: {error}"
            continue
        found[kernel] = hashlib.sha256(read(stages, tuple(SAMPLE), [20, 1, len(SAMPLE) - 21])).hexdigest()
    return found


@pytest.fixture(scope="module")
def stored(exact_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model as files, for other processes."""
    index = {}
    for name in VARIANTS:
        manifest, folder = exact_model(name)
        index[name] = (manifest.to_bytes().hex(), {blob: str(path) for blob, path in folder.paths.items()})
    path = tmp_path_factory.mktemp("stored") / "index.json"
    path.write_text(json.dumps(index))
    return path


def child(index: Path) -> dict[str, dict[str, str]]:
    found = {}
    for name, (manifest, paths) in json.loads(index.read_text()).items():
        folder = Folder(index.parent, {blob: Path(path) for blob, path in paths.items()})
        found[name] = digests((Manifest.from_bytes(bytes.fromhex(manifest)), folder))
    return found


@pytest.fixture(scope="module")
def here(stored: Path) -> dict[str, dict[str, str]]:
    return child(stored)


@pytest.mark.parametrize("limits", SETTINGS, ids=lambda limits: "-".join(limits.values()))
def test_every_instruction_set_gives_the_same_bits(limits: dict[str, str], stored: Path, here: dict[str, dict[str, str]]) -> None:
    """In another process, where the libraries are told to keep to less than this processor has. Kernels that give wrong sums there
    must find it out themselves; the float32 one is right everywhere."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.exact.test_same_bits", str(stored)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **limits},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert run.returncode == 0, run.stderr[-2000:]
    there = json.loads(run.stdout)
    for name, by_kernel in there.items():
        right = {digest for digest in by_kernel.values() if not digest.startswith("refused")}
        assert right == {here[name][REFERENCE]}, (name, by_kernel)
        assert by_kernel[REFERENCE] == here[name][REFERENCE]
    if limits.get("ONEDNN_MAX_CPU_ISA") in ("AVX2", "SSE41"):
        assert there["llama"]["torch:onednn"].startswith("refused"), "int8 products without VNNI saturate: the test must see it"


if __name__ == "__main__":
    print(json.dumps(child(Path(sys.argv[1]))))
