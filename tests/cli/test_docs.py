"""Every command, option and setting is documented. (The idea is sqlite-utils'.)"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nexus.gateway.control import ROUTES
from nexus_cli.daemon import nexusd
from nexus_cli.main import nexus
from nexus_config.settings import default_text, setting_names

ROOT = Path(__file__).parents[2]
CLI, CONFIGURATION = ((ROOT / "docs" / name).read_text("utf-8") for name in ("cli.md", "configuration.md"))


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}")


ALL = [*commands(nexus, "nexus"), *commands(nexusd, "nexusd")]
GROUPS_WITHOUT_A_TASK = {path for path, command in ALL if isinstance(command, click.Group) and command.callback is None}


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_a_command_is_documented(path: str, command: click.Command) -> None:
    if path not in GROUPS_WITHOUT_A_TASK:
        assert f"**`{path}`**" in CLI
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert f"`{name}`" in CLI, f"{path} {name}"
            assert parameter.help, f"{path} {parameter.name} has no help"
    assert command.help, path


def test_no_command_or_option_is_documented_that_is_not_there() -> None:
    paths = {path for path, _ in ALL}
    assert set(re.findall(r"\*\*`(nexus[^`]*)`\*\*", CLI)) <= paths
    parameters = [parameter for _, command in ALL for parameter in command.params]
    options = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    assert set(re.findall(r"`(--[a-z-]+)`", CLI)) <= options


def test_every_setting_is_documented_with_its_default() -> None:
    document = tomllib.loads(default_text())
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", CONFIGURATION, re.MULTILINE))
    settings = {key: value for key, value in rows.items() if key in setting_names()}
    assert set(settings) == set(setting_names())
    for key, shown in settings.items():
        section, name = key.split(".")
        if shown.startswith("`") and document[section][name] != "":
            assert tomllib.loads(f"x = {shown.strip('`')}")["x"] == document[section][name], key


def test_every_path_of_the_control_api_is_documented() -> None:
    for _, path, _ in ROUTES:
        assert f"`{path}" in CLI, path


def test_the_default_named_in_help_is_the_one_that_holds() -> None:
    from nexus.node.api import EmbedRequest, GenerateRequest

    request = GenerateRequest("", "")
    shown = {parameter.name: parameter for parameter in nexus.commands["run"].params if isinstance(parameter, click.Option)}
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        assert f"[default: {getattr(request, name):g}]" in str(shown[name].help)
    embed = {parameter.name: parameter for parameter in nexus.commands["embed"].params if isinstance(parameter, click.Option)}
    assert f"[default: {EmbedRequest(()).model}]" in str(embed["model"].help)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\(([^)]+)\)", (ROOT / "docs" / "index.md").read_text("utf-8")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= listed
