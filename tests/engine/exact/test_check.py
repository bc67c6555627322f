"""The check of the engine finds what is wrong: a product that saturates, other bits, and a machine on which nothing is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nexus.core.manifest import Manifest
from nexus.engine.benchmark import measure_speed
from nexus.engine.exact import check, gemm, native
from nexus.engine.exact.stage import ExactStage
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage
from nexus.models import MINILM, NANO, builtin_path
from tests.engine.conftest import Folder

DEPTHS = (136, 576, 2048)


def run(depths: tuple[int, ...] = DEPTHS) -> check.EngineReport:
    return check.check_engine(depths, lambda *_: None)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No verdict is remembered, neither from before nor afterwards."""
    for name in ("_model_verdict", "_depth_verdict"):
        monkeypatch.setattr(check, name, getattr(check, name).__wrapped__)
    monkeypatch.setattr(gemm, "_verdict", gemm._verdict.__wrapped__)
    return monkeypatch


class Saturating(gemm.IntMM):
    """As oneDNN's products are on x86 without VNNI: inputs made positive by adding 128, and sums of pairs that end at 16 bits."""

    name = "saturating"

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._weight.t().int()
        products = (x[:, None].int() + 128) * weight[None]
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        return pairs.sum(-1).int() - 128 * weight.sum(-1).int()


def test_the_kernels_of_this_machine_give_the_bits_of_every_machine() -> None:
    told: list[tuple[int, int]] = []
    report = check.check_engine(DEPTHS, lambda *event: told.append(event))
    names = [kernel.name for kernel in report.kernels if kernel.name != "compiled"]
    assert names == [*native.available(), "torch:onednn", "torch:int_mm", "torch:float32 blocks"]
    assert report.kernels[-1].right  # whatever the processor
    assert report.kernel == report.depths[0].kernel != ""
    assert told[-1] == (len(names) * len(DEPTHS),) * 2
    for kernel in report.kernels:
        assert kernel.right != bool(kernel.reason)


def test_a_kernel_that_saturates_is_found_and_passed_over(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "available", list)
    fresh.setattr(gemm, "KERNELS", (Saturating, gemm.Float32Blocks))
    report = run()
    compiled, saturating, blocks = report.kernels
    assert (compiled.right, saturating.right, blocks.right) == (False, False, True)
    assert "C compiler" in compiled.reason
    assert [depth.kernel for depth in report.depths] == ["torch:float32 blocks"] * len(DEPTHS)
    assert all(depth.reason.startswith("not torch:saturating: ") for depth in report.depths)


def test_depths_alone_find_a_kernel_that_is_wrong_only_there(fresh: pytest.MonkeyPatch) -> None:
    class WrongWhenDeep(gemm.IntMM):
        name = "shallow"

        def sums(self, x: torch.Tensor) -> torch.Tensor:
            return super().sums(x) + (x.shape[1] > 1000)

    fresh.setattr(native, "available", list)
    fresh.setattr(gemm, "KERNELS", (WrongWhenDeep, gemm.Float32Blocks))
    report = run()
    assert [depth.kernel for depth in report.depths] == ["torch:shallow", "torch:shallow", "torch:float32 blocks"]
    assert report.kernel == "torch:float32 blocks"


def test_when_other_bits_come_out_nothing_is_right(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(check, "EXPECTED", "0" * 64)
    report = run((136,))
    assert report.kernel == ""
    assert [depth.kernel for depth in report.depths] == [""]
    assert all("other bits" in kernel.reason for kernel in report.kernels if kernel.name != "compiled")


@pytest.mark.skipif(not native.available(), reason="the compiled kernel was not built here")
def test_a_compiled_kernel_with_wrong_sums_at_a_depth_is_found(fresh: pytest.MonkeyPatch) -> None:
    step = native.NativeModel.step

    def wrong(self: native.NativeModel, *arguments: object, **options: object) -> torch.Tensor:
        out = step(self, *arguments, **options)  # type: ignore[arg-type]
        return out if self.plan.ffn < 500 else torch.nextafter(out, torch.tensor(9.0))

    fresh.setattr(native.NativeModel, "step", wrong)
    report = run((136, 576))
    assert report.depths[0].kernel == native.available()[0]
    assert report.depths[1].kernel.startswith("torch:")


@pytest.mark.skipif(len(native.available()) < 2, reason="there are not two compiled kernels here")
def test_a_stage_takes_no_kernel_that_is_wrong(fresh: pytest.MonkeyPatch, nano: tuple[Manifest, Folder]) -> None:
    manifest, folder = nano
    first, second, *_ = native.available()
    wrong = {first}
    fresh.setattr(check, "_model_verdict", lambda name: "gives other bits" if name in wrong else "")
    stage = load_stage(manifest, 0, 2, folder.paths)
    assert isinstance(stage, ExactStage)
    assert stage.kernel == f"native ({second})"
    wrong.update(native.available())
    stage = load_stage(manifest, 0, 2, folder.paths)
    assert isinstance(stage, ExactStage)
    assert stage.kernel.startswith("torch")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:
    folder = Folder(tmp_path_factory.mktemp("nano"))
    return import_model(builtin_path(NANO), folder, lambda *_: None, profile="exact"), folder


def test_speed_is_measured_against_what_a_token_reads(nano: tuple[Manifest, Folder]) -> None:
    manifest, folder = nano
    stage = load_stage(manifest, 0, manifest.layers, folder.paths)
    told: list[tuple[int, int]] = []
    speed = measure_speed(stage, lambda *event: told.append(event))
    assert told[-1][0] == told[-1][1]
    assert speed.decode_tokens_per_s is not None
    assert speed.bytes_per_token is not None
    assert speed.share is not None
    # All weights, the embedding being the head too, and the cache of 160 tokens.
    cache = 160 * manifest.layers * manifest.kv_bytes
    assert speed.bytes_per_token - cache == manifest.weight_bytes
    assert speed.bandwidth_bytes_per_s == pytest.approx(speed.bytes_per_token * speed.decode_tokens_per_s)
    assert speed.share > 0


def test_an_encoder_does_not_decode(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    manifest = import_model(builtin_path(MINILM), folder, lambda *_: None, profile="float")
    speed = measure_speed(load_stage(manifest, 0, manifest.layers, folder.paths), lambda *_: None)
    assert speed.prefill_tokens_per_s > 0
    assert (speed.decode_tokens_per_s, speed.bytes_per_token, speed.share) == (None, None, None)


@pytest.mark.parametrize("kernel", check.kernel_names())
def test_a_kernel_leaves_the_thread_able_to_compute(kernel: str) -> None:
    """MMX registers that are left in use make every number of the x87 unit NaN, with which C libraries compute remainders."""
    check.model_digest(kernel)
    assert np.float64(500.0) // np.float64(100.0) == 5.0
