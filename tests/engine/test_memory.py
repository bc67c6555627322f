"""Memory, measured in a process of its own: adding a model streams it, in either profile, and a loaded stage takes its share of the
weights + 10 %."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = '''
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from nexus.core.manifest import Blob, stage_pieces
from nexus.engine.importer import import_model
from nexus.engine.stage import load_stage

torch.set_num_threads(1)


class Folder:
    def __init__(self, root):
        self.root, self.paths, self.by_root = root, {}, {}

    def put(self, name: str, size: int, chunks: Iterable[bytes]) -> Blob:
        self.paths[name] = self.root / name
        with self.paths[name].open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        root = hashlib.sha256(name.encode()).digest()
        self.by_root[root] = self.paths[name]
        return Blob(name, size, root)

    def path(self, root: bytes) -> Path:
        return self.by_root[root]


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_of(action):
    """Growth of resident memory at its highest while the action runs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = action()
    return result, status("VmHWM") - before


small, large, out = (Path(argument) for argument in sys.argv[1:4])
for part in ("small", "large", "exact-small", "exact-large"):
    (out / part).mkdir()
# The first load pays for code and tables that every later one shares.
folder = Folder(out / "small")
manifest = import_model(small, folder, lambda *_: None, profile="float")
kept = [load_stage(manifest, 2, 7, folder.paths)]

folder = Folder(out / "large")
manifest, grown = peak_of(lambda: import_model(large, folder, lambda *_: None, profile="float"))
print("import", manifest.weight_bytes, grown)
for start, end in ((2, 7), (6, 8)):
    share = sum(piece.size for piece in stage_pieces(manifest, start, end))
    stage, grown = peak_of(lambda: load_stage(manifest, start, end, folder.paths, dtype="float32"))
    print("stage", share, grown, flush=True)
    kept.append(stage)

import_model(small, Folder(out / "exact-small"), lambda *_: None, profile="exact")
folder = Folder(out / "exact-large")
manifest, grown = peak_of(lambda: import_model(large, folder, lambda *_: None, profile="exact"))
print("exact", manifest.weight_bytes, grown)
'''


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(make_model: Callable[..., Path], tmp_path: Path) -> None:
    small = make_model("llama")
    # 8 layers of 38 MB: large beside what the interpreter itself needs.
    large = make_model(
        "llama", hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_key_value_heads=12, head_dim=64
    )
    program = tmp_path / "measure.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, program, small, large, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    (_, weights, grown), *stages, (_, exact_weights, exact_grown) = rows
    assert int(weights) > 250 << 20
    assert int(grown) < 24 << 20, f"adding {int(weights) >> 20} MiB took {int(grown) >> 20} MiB"
    for _, share, grown in stages:
        assert int(grown) < 1.1 * int(share), f"a stage of {int(share) >> 20} MiB took {int(grown) >> 20} MiB"
    # Blocks of float32 at work, the int8 form of one tensor, then one layer for the known answers.
    assert int(exact_weights) > 60 << 20
    assert int(exact_grown) < 64 << 20, f"converting to {int(exact_weights) >> 20} MiB took {int(exact_grown) >> 20} MiB"
