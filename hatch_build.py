"""Build hook: compiles the exact engine's kernel where there is a C compiler. Nexus installs and gives the same bits without it."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = Path("nexus", "engine", "exact")


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or os.environ.get("NEXUS_NO_NATIVE") == "1":
            return
        native_build = _module(Path(self.root, _PACKAGE, "native_build.py"))
        try:
            variants = native_build.build()
        except native_build.BuildError as error:
            native_build.LIBRARY.unlink(missing_ok=True)  # of older sources
            self.app.display_warning(f"The compiled kernel is left out, the slower torch one gives the same bits: {error}")
            return
        self.app.display_info(f"Compiled kernel: {', '.join(variants)}")
        # It is loaded by ctypes, so any Python 3 will do, but only this platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append((_PACKAGE / native_build.LIBRARY.name).as_posix())


def _module(path: Path) -> ModuleType:
    """The compiling module by itself: what the package imports is not installed yet."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
