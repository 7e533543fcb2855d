"""The command line: one module a verb, imported when the verb is used, so that `kvstore stats` never waits for MLX."""

import signal
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The entry point of the `kvstore` script. Ctrl-C is one line, also while the command line is being imported."""
    try:
        from kvstore.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("\nkvstore: interrupted\n")  # as click does: below ^C
        sys.exit(1)
    finally:  # as Python shuts down it would print where it was; a daemon that has stopped ignores Ctrl-C
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
