"""What every command shares: --json, --home, --timeout and --no-color, before or after the command's name.

Nothing heavy is imported here, or at the top of any command's module: `nexus --help` has to be quick.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from nexus.storage.home import Home
    from nexus_config.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Shared:
    """The shared options as given. `timeout_s` None: the command's own default."""

    json: bool = False
    home: Path | None = None
    timeout_s: float | None = None
    no_color: bool = False

    @property
    def path(self) -> Path:
        """The data directory that this command is about."""
        from nexus_config.settings import default_home

        return (self.home or default_home(os.environ)).expanduser().absolute()

    def settings(self) -> Settings:
        from nexus_config.settings import load

        return load({}, os.environ, self.path)[0]

    def open_home(self) -> Home:
        from nexus.storage.home import open_home

        return open_home(self.path)


pass_shared = click.make_pass_decorator(Shared, ensure=True)


def _store(name: str) -> Callable[[click.Context, click.Parameter, object], None]:
    def store(context: click.Context, parameter: click.Parameter, value: object) -> None:
        # An option left out where it may stand a second time must not undo the first.
        if value is not None and value is not False:
            setattr(context.ensure_object(Shared), name, value)

    return store


def check_home(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """An empty path is a variable that was not set, not the working directory."""
    if value is not None and not value.parts:
        raise click.BadParameter("is empty", context, parameter)
    return value


def _store_home(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    _store("home")(context, parameter, check_home(context, parameter, value))


def _check_timeout(context: click.Context, parameter: click.Parameter, value: float | None) -> None:
    if value is not None and not 0 < value < 1e7:  # also false for NaN
        raise click.BadParameter("must be a number of seconds above 0", context, parameter)
    _store("timeout_s")(context, parameter, value)


def shared_parameters() -> list[click.Parameter]:
    """The options that every command takes."""
    return [
        click.Option(
            # Eager: known before anything else can be wrong with the command line.
            ["--json"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_store("json"),
            help="Print one JSON object on stdout.",
        ),
        click.Option(
            ["--home"],
            type=click.Path(path_type=Path),
            expose_value=False,
            callback=_store_home,
            help="Data directory. [default: NEXUS_HOME, or the user's data directory]",
        ),
        click.Option(
            ["--timeout"], type=float, expose_value=False, callback=_check_timeout, help="Give up after this many seconds."
        ),
        click.Option(
            ["--no-color"], is_flag=True, expose_value=False, callback=_store("no_color"), help="Plain text, as with NO_COLOR."
        ),
    ]


class NexusCommand(click.Command):
    """A command that also takes the shared options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(shared_parameters())


class NexusGroup(click.Group):
    """A group that also takes the shared options; without a command it prints its help, unless it has a task of its own."""

    command_class = NexusCommand

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"invoke_without_command": True}))
        self.params.extend(shared_parameters())

    def invoke(self, context: click.Context) -> Any:
        if self.callback is None and not context._protected_args and not context.args:
            click.echo(context.get_help())
            return None
        return super().invoke(context)


NexusGroup.group_class = NexusGroup


def daemon_options(function: F) -> F:
    """What a daemon is started with."""
    for option in (
        click.option("--log-format", type=click.Choice(["auto", "text", "json"]), help="Form of the log. [default: log.format]"),
        click.option(
            "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level. [default: log.level]"
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a setting, as in --set network.mdns=false."
        ),
        click.option("--init", is_flag=True, help="Make the data directory first if there is none."),
    ):
        function = option(function)
    return function


def flags_from(settings: tuple[str, ...], log_level: str | None, log_format: str | None) -> Mapping[str, object]:
    """Settings given as flags, by "section.key"."""
    flags: dict[str, object] = {}
    for entry in settings:
        key, equals, value = entry.partition("=")
        if not equals:
            raise click.BadParameter(f"{entry!r} is not KEY=VALUE", param_hint="--set")
        flags[key] = value
    if log_level:
        flags["log.level"] = log_level
    if log_format:
        flags["log.format"] = log_format
    return flags
