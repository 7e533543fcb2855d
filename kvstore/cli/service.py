"""`kvstore service`: the daemon as a service of the user, from login on: launchd on macOS, systemd on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import click

from kvstore import __version__
from kvstore.cli.app import EXIT_FAILURE, EXIT_UNREACHABLE, Suggesting
from kvstore.cli.common import (
    absolute_address,
    client_config,
    common_options,
    note,
    print_facts,
    print_json,
    say,
    stats_or_error,
)
from kvstore.cli.managers import Manager, ServiceState, Step, daemon_command, manager_of, this_host
from kvstore.config import ENV_CONFIG, ENV_PREFIX, Config, default_data_dir, keys_home
from kvstore.errors import DirectoryHeldError, InvalidRequestError, KVStoreError, VersionError

# A daemon reads its index before it answers; a large one takes seconds.
ANSWER_S = 30.0
LOOK_S = 0.2
LINES_DEFAULT = 100
NOT_INSTALLED = "the service is not installed, and has no log; run: kvstore service install"

dry_run_option = click.option("--dry-run", is_flag=True, help="Print the file and the commands; change nothing.")


@click.group("service", cls=Suggesting)
def command() -> None:
    """Run the daemon as a service of this user: from login on, and again after a crash.

    On macOS a LaunchAgent of launchd, on Linux a user unit of systemd. No administrator is needed, and none is wanted:
    the store belongs to one user.
    """


@command.command("install", short_help="Install or update the service, and start it.")
@dry_run_option
@common_options
def install(dry_run: bool, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Install the service, or bring it up to date, and start it. Doing it twice changes nothing.

    The daemon is started with the --config and --address that are given here. It sees no variable of this shell:
    settings belong into the configuration file.
    """
    manager = _manager(dry_run)
    config = client_config(address, config_path)
    content = manager.render(
        daemon_command(sys.argv[0], config_path or os.environ.get(ENV_CONFIG), absolute_address(address))
    )
    daemon = _ask(config)
    if not dry_run:
        manager.require()
        _require_free(manager, config, daemon)
    steps = manager.installation(content, restart=_is_of_another_version(daemon))
    for name in sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name != ENV_CONFIG):
        note(f"the service does not see {name} of this shell; write it into the configuration file")
    if _planned(manager, steps, dry_run=dry_run, as_json=as_json):
        return
    for step in steps:
        step.carry_out(manager.host.run)
    daemon = _await_daemon(manager, config)
    if as_json:
        print_json({"manager": manager.name, "path": str(manager.path), "changed": bool(steps), "pid": daemon["pid"]})
        return
    say(f"{'installed' if steps else 'already installed:'} {manager.path}")
    say(f"the daemon (pid {daemon['pid']}) answers at {config.listen}, and starts at login from now on")


@command.command("uninstall")
@dry_run_option
@common_options
def uninstall(dry_run: bool, address: str | None, config_path: str | None, as_json: bool) -> None:
    """Stop the daemon and remove the service. What is stored stays."""
    manager = _manager(dry_run)
    config = client_config(address, config_path)
    steps = manager.removal()
    if _planned(manager, steps, dry_run=dry_run, as_json=as_json):
        return
    for step in steps:
        step.carry_out(manager.host.run)
    if as_json:
        print_json({"manager": manager.name, "path": str(manager.path), "changed": bool(steps)})
        return
    say(f"removed {manager.path}" if steps else "the service is not installed")
    kept = [str(path) for path in (config.data_dir, keys_home(config)) if path.exists()]
    if kept:
        note(f"what is stored stays in {', '.join(kept)}; delete it if you want it gone")


@command.command("status", short_help="Whether it is installed, runs and answers.")
@common_options
def status(address: str | None, config_path: str | None, as_json: bool) -> int:
    """Show whether the service is installed and runs, and whether its daemon answers.

    Exit status 0 if the daemon answers, 1 if the service is not installed, 3 if it is and the daemon does not answer.
    """
    manager = manager_of(this_host())
    config = client_config(address, config_path)
    state = manager.state()
    daemon = _ask(config)
    answers = isinstance(daemon, dict)
    if as_json:
        fields = {"installed": state.installed, "running": state.running, "pid": state.pid, "detail": state.detail}
        print_json({"manager": manager.name, "path": str(manager.path), **fields, "answers": answers})
    else:
        _print_status(manager, state, config, daemon)
    return (0 if answers else EXIT_UNREACHABLE) if state.installed else EXIT_FAILURE


@command.command("logs")
@click.option("--lines", "-n", type=click.IntRange(1), default=LINES_DEFAULT, show_default=True, help="Lines to print.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is logged from now on, until Ctrl-C.")
@common_options
def logs(lines: int, follow: bool, address: str | None, config_path: str | None, as_json: bool) -> int:
    """Print the end of the service's log."""
    manager = manager_of(this_host())
    argv = manager.log_command(lines, follow=follow)
    if follow:
        if as_json:
            raise click.UsageError("--follow never ends, and --json is one answer; give one of them")
        if not manager.path.is_file():
            raise KVStoreError(NOT_INSTALLED)
        return _followed(argv)
    ended = manager.host.run(argv)
    # A log outlives its service, so it is printed where there is one.
    if not (ended.stdout or manager.path.is_file()):
        raise KVStoreError(NOT_INSTALLED)
    if ended.returncode:
        said = ended.stderr.strip().splitlines()
        raise KVStoreError(f"there is no log: {said[-1] if said else argv[0]}")
    if as_json:
        print_json({"lines": ended.stdout.splitlines()})
        return 0
    for line in ended.stdout.splitlines():
        say(line)
    if not ended.stdout:
        note("the log is empty")
    return 0


def _followed(argv: list[str]) -> int:
    try:
        return subprocess.run(argv, check=False).returncode
    except OSError as error:
        raise KVStoreError(f"{argv[0]} cannot be run: {error.strerror}") from error
    except KeyboardInterrupt:
        return 0


def _manager(dry_run: bool) -> Manager:
    """The manager of this user; InvalidRequestError for root, unless nothing is done."""
    host = this_host()
    if not host.uid and not dry_run:
        raise InvalidRequestError(
            "the service is one user's, and this is root: run it without sudo, as the user who runs the model servers"
        )
    return manager_of(host)


def _planned(manager: Manager, steps: list[Step], *, dry_run: bool, as_json: bool) -> bool:
    """Print the steps if that is all that is asked for; whether it is."""
    if not dry_run:
        return False
    content = next((step.content.decode() for step in steps if step.content is not None), "")
    if as_json:
        commands = [str(step) for step in steps]
        print_json({"manager": manager.name, "path": str(manager.path), "file": content, "commands": commands})
        return True
    for line in content.splitlines():
        say(line)
    for step in steps:
        say(f"# {step}")
    if not steps:
        note("nothing is to be done")
    return True


def _is_of_another_version(daemon: dict[str, Any] | KVStoreError) -> bool:
    """Whether what answers is not of this kvstore, as after an upgrade."""
    return daemon["version"] != __version__ if isinstance(daemon, dict) else isinstance(daemon, VersionError)


def _require_free(manager: Manager, config: Config, daemon: dict[str, Any] | KVStoreError) -> None:
    """DirectoryHeldError while a daemon runs that is not the service; DirectoryError if it could not start."""
    from kvstore.engine import require_store

    if isinstance(daemon, (dict, VersionError)) and not manager.state().running:
        how = f"with `kill {daemon['pid']}`" if isinstance(daemon, dict) else "first; it is of another version"
        raise DirectoryHeldError(
            f"a daemon runs already, and the service would be refused the directory; stop it {how}, then install again"
        )
    if config.data_dir != default_data_dir():
        require_store(config.data_dir)


def _ask(config: Config) -> dict[str, Any] | KVStoreError:
    """The daemon's own part of what it says, or why it says nothing."""
    found = stats_or_error(config)
    return found["daemon"] if isinstance(found, dict) else found


def _await_daemon(manager: Manager, config: Config) -> dict[str, Any]:
    """What the daemon says once it answers; KVStoreError if it ends or takes too long."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        daemon = _ask(config)
        if isinstance(daemon, dict):
            return daemon
        state = manager.state()
        if state.detail or time.monotonic() > deadline:
            why = f"ended with {state.detail}" if state.detail else f"does not answer ({daemon})"
            raise KVStoreError(f"the service is installed, and its daemon {why}; see: kvstore service logs")
        time.sleep(LOOK_S)


def _print_status(manager: Manager, state: ServiceState, config: Config, daemon: dict[str, Any] | KVStoreError) -> None:
    how = f"running, pid {state.pid}" if state.running else f"stopped{f' ({state.detail})' if state.detail else ''}"
    answers = (
        f"answers at {config.listen}, pid {daemon['pid']}, version {daemon['version']}"
        if isinstance(daemon, dict)
        else str(daemon)
    )
    print_facts(
        manager.name,
        [
            ("file", str(manager.path) if state.installed else "not installed; run: kvstore service install"),
            *([("service", how)] if state.installed else []),
            ("daemon", answers),
        ],
    )
