"""nexus config: which settings hold, and where each comes from."""

from __future__ import annotations

import os

import click

from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

config = NexusGroup(name="config", help="Settings of this node.")


@config.command("show")
@click.option("--origin", is_flag=True, help="Say of each setting where it comes from.")
@pass_shared
def config_show(shared: Shared, origin: bool) -> None:
    """Print every setting as it holds, in the form of config.toml."""
    import json

    from nexus_config.settings import load, setting_names

    settings, origins = load({}, os.environ, shared.path)
    values = {key: getattr(getattr(settings, key.split(".")[0]), key.split(".")[1]) for key in setting_names()}
    shown: dict[str, object] = {
        key: "auto" if value is None else list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
    if shared.json:
        show.print_json({"home": str(shared.path), "settings": shown} | ({"origins": origins} if origin else {}))
        return
    section = ""
    for key in setting_names():
        name, entry = key.split(".")
        if name != section:
            click.echo(f"{chr(10) if section else ''}[{name}]")
            section = name
        # JSON's form of text, numbers, booleans and lists of text is TOML's, too.
        line = f"{entry} = {json.dumps(shown[key], ensure_ascii=False)}"
        click.echo(f"{line:<40}  # {origins[key]}" if origin else line)
