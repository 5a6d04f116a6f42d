"""The ``kvlayer`` program: a group whose commands come from the entry points ``kvlayer.commands``.

Exit codes: 0 done; 1 the command ran and the answer is bad, or a tier failed; 2 the command line
or the configuration is wrong; 3 a plugin is missing or broken.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from kvlayer._version import version
from kvlayer.config.registry import COMMANDS, Registry
from kvlayer.errors import ConfigError, KVLayerError, PluginError, UnknownSchemeError

__all__ = ["EXIT_BAD", "EXIT_PLUGIN", "EXIT_USAGE", "ElsewhereError", "Program", "main", "program"]

EXIT_BAD = 1
EXIT_USAGE = 2  # also what click exits with for a wrong command line
EXIT_PLUGIN = 3

ELSEWHERE: Mapping[str, str] = MappingProxyType({"demo": "kvlayer-transformers[demo]"})
"""Commands of this project that another distribution brings."""

_OUTPUT_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What writing to stdout ends in that no pipe is behind; tiers raise errors of ours."""


class ElsewhereError(PluginError):
    """A command of this project whose distribution is not installed."""

    def __init__(self, command: str, requirement: str) -> None:
        distribution = requirement.partition("[")[0]
        super().__init__(
            f"the command {command!r} comes with {distribution}, which is not installed",
            hint=f"install {requirement}; from a checkout: pip install './plugins/{requirement}'",
        )


class Program(click.Group):
    """A click group that imports a command only when it is run, and lists all regardless."""

    def __init__(self, commands: Registry[click.Command] = COMMANDS, **settings: Any) -> None:
        super().__init__(**settings)
        self._plugins = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._plugins.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command. Raises ``PluginError`` when it is broken, missing or unknown."""
        try:
            return self._plugins.load(cmd_name)
        except UnknownSchemeError:
            if cmd_name in ELSEWHERE:
                raise ElsewhereError(cmd_name, ELSEWHERE[cmd_name]) from None
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except ElsewhereError:
            raise
        except UnknownSchemeError as exc:
            raise click.UsageError(f"{exc}\n{exc.hint}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and who ships them, from metadata: ``--help`` works whatever is broken."""
        rows = [(plugin.name, f"from {plugin}") for plugin in self._plugins.installed()]
        with formatter.section("Commands"):
            formatter.write_dl(rows or [("(none)", "no distribution offers one")])
        missing = {name: what for name, what in ELSEWHERE.items() if name not in dict(rows)}
        if missing:
            with formatter.section("Not installed"):
                formatter.write_dl([(name, f"comes with {what}") for name, what in missing.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVLayerError as exc:
            click.echo(f"error: {exc}", err=True)
            if exc.hint is not None:
                click.echo(f"hint: {exc.hint}", err=True)
            ctx.exit(_exit_code(exc))


def _exit_code(error: KVLayerError) -> int:
    if isinstance(error, PluginError):
        return EXIT_PLUGIN
    return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_BAD


def _print_version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"kvlayer {version()}")
        ctx.exit()


_VERSION = click.Option(
    ["--version"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)

program = Program(
    name="kvlayer",
    help="The KV cache of an LLM engine as shared, durable data.",
    epilog="Exit codes: 0 done, 1 the answer is bad, 2 wrong usage or configuration, 3 a plugin is "
    "missing or broken.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    params=[_VERSION],
)


def main() -> None:
    """Entry point of the console script."""
    try:
        program.main(prog_name="kvlayer")
    except OSError as exc:
        if exc.filename is not None or exc.errno not in _OUTPUT_IS_FULL:
            raise
        click.echo(f"error: the output cannot be written: {exc.strerror}", err=True)
        sys.exit(EXIT_BAD)
