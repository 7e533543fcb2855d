"""The `kvstore` command: the table of verbs, the table of exit codes, and errors as one line on stderr."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import errno
import importlib
import io
import logging
import os
import sys
from typing import Any, NoReturn

import click

from kvstore import __version__, errors
from kvstore.core.text import plain_text

# verb -> where it is and its line in `kvstore --help`, so that help and dispatch import no verb but the one asked for.
VERBS = {
    "serve": ("kvstore.cli.serve", "Run the daemon that owns the store."),
    "run": ("kvstore.cli.run", "Start an inference server with the store plugged in."),
    "stats": ("kvstore.cli.stats", "Counters of the daemon and the state of its disk."),
    "top": ("kvstore.cli.top", "What the daemon does now, once a second."),
    "ls": ("kvstore.cli.ls", "Stored sequences, or their blocks."),
    "show": ("kvstore.cli.show", "Everything recorded about a namespace or a block."),
    "why": ("kvstore.cli.why", "Why a prompt missed: where it parts from what is stored."),
    "doctor": ("kvstore.cli.doctor", "Check daemon, disk and limits; say what to fix."),
    "set": ("kvstore.cli.set", "Change a setting of the daemon or of a namespace."),
    "pin": ("kvstore.cli.pin", "Keep a prompt, whatever else is evicted."),
    "evict": ("kvstore.cli.evict", "Remove blocks from the store."),
    "check": ("kvstore.cli.check", "Verify every blob, and repair."),
    "export": ("kvstore.cli.export", "Write a namespace or a sequence to a file."),
    "import": ("kvstore.cli.import_", "Take such a file into the store."),
    "calibrate": ("kvstore.cli.calibrate", "Measure what profiles cost on a model."),
    "bench": ("kvstore.cli.bench", "Measure the store on this machine."),
    "config": ("kvstore.cli.config", "Show the configuration in force; make certificates."),
    "service": ("kvstore.cli.service", "Run the daemon from login on."),
}

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_DAMAGE = 4
EXIT_HELD = 5

# The first class that an error is an instance of decides; any other KVStoreError is a failure.
EXIT_CODES: tuple[tuple[type[errors.KVStoreError], int], ...] = (
    (errors.DirectoryHeldError, EXIT_HELD),
    (errors.UnavailableError, EXIT_UNREACHABLE),
    (errors.DeadlineError, EXIT_UNREACHABLE),
    (errors.UntrustedError, EXIT_UNREACHABLE),
    (errors.ConfigError, EXIT_USAGE),
    (errors.InvalidRequestError, EXIT_USAGE),
)

# What writing to standard output raises: a full disk, a closed descriptor, a terminal that went away.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def exit_code(error: errors.KVStoreError) -> int:
    """The exit code for `error`."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILURE)


class Suggesting(click.Group):
    """A command group that suggests the closest command for a misspelled one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; a usage error for a command that is not there says which one is near."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            help_of = " ".join(["kvstore", *ctx.command_path.split()[1:]])
            hint = f"Did you mean {near[0]!r}?" if near else f"See: {help_of} --help"
            ctx.fail(f"No such command {name!r}. {hint}")
        return super().resolve_command(ctx, args)


class ClosedOutput(io.TextIOBase):
    """Replaces standard output if it was closed before the process started; Python sets it to None then."""

    def write(self, text: str) -> int:
        """Raises OSError: this stream cannot be read."""
        raise OSError(errno.EBADF, "standard output is closed")


class Verbs(Suggesting):
    """Imports a verb's module when it is used, and turns every error into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(VERBS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs for `--help`, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command line and exit."""
        kwargs["standalone_mode"] = False
        logging.getLogger("kvstore").addHandler(logging.NullHandler())  # an error is one line, and is said below
        if sys.stdout is None:
            sys.stdout = ClosedOutput()
        try:
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(EXIT_USAGE)
        except click.ClickException as error:
            _complain(error.format_message())
            sys.exit(error.exit_code)
        except click.Abort:
            _complain("interrupted")
            sys.exit(EXIT_FAILURE)
        except errors.KVStoreError as error:
            _complain(str(error))
            sys.exit(exit_code(error))
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            _drop_output()
            sys.exit(EXIT_FAILURE)
        except OSError as error:
            is_output = error.filename is None and error.errno in _OUTPUT_ERRORS
            about = "the answer cannot be written" if is_output else error.filename
            _complain(": ".join(str(part) for part in (about, error.strerror or error) if part))
            _drop_output()
            sys.exit(EXIT_FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def _drop_output() -> None:
    """Drop pending output, so that Python's flush at exit does not fail."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    click.echo(f"kvstore: {plain_text(' '.join(message.split()))}", err=True)


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"kvstore {__version__}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="The version.")
def cli() -> None:
    """Persistent KV prefix cache store for MLX inference.

    Exit status: 0 done, 1 failure, 2 wrong usage or configuration, 3 the daemon cannot be reached or trusted, 4 damage
    was found, 5 another daemon holds the directory.
    """


def run() -> NoReturn:
    """Run the command line of this process, and exit."""
    try:
        cli.main(prog_name="kvstore")
    except SystemExit as end:
        if "obstore" in sys.modules:
            _end_at_once(end.code)
        raise


def _end_at_once(code: object) -> NoReturn:
    """End the process without taking the interpreter down.

    The threads of obstore's runtime may still let go of Python objects then, and what does that aborts the process.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - the only way to have them run
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else EXIT_FAILURE if code else 0)
