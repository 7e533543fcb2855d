"""Limits other than the shipped ones, in this process and in others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from kvstore.config import Config
from kvstore.core.limits import Limits, default_limits

# Deadlines of fetches that do not decide a test on a busy machine. Tests of deadlines set their own;
# `e2e/test_failures.py` has most of them. The total is a key, the others are limits.
OPEN_DEADLINES = {"fetch_connect_ms": 10_000, "fetch_stall_ms": 20_000, "fetch_total_ms": 60_000}
# A server whose client waits as long as these deadlines also where it connects, where it stores and when it ends.
PATIENT = """\
from kvstore.client import channel, health, uploader
from kvstore.integrations import run
channel.ATTEMPT_S = health.ASK_S = uploader.CONNECT_S = uploader.BEGIN_S = uploader.ACCEPTED_S = run.FLUSH_S = 30.0
"""
NAMES = frozenset(one.name for one in fields(Limits))


def make_config(**settings: Any) -> Config:
    """A configuration. Names of `Limits` among the settings become limits, the others are keys."""
    limits = {name: value for name, value in settings.items() if name in NAMES}
    keys = {name: value for name, value in settings.items() if name not in NAMES}
    return Config(**keys, limits=replace(default_limits(), **limits))


def small_config(listen: str, **settings: Any) -> Config:
    """The configuration of a client that waits for a busy daemon and takes prefixes of any length."""
    return make_config(**{"listen": listen, "min_prefix_tokens": 1, **OPEN_DEADLINES, **settings})


def set_limits(limits: Mapping[str, int]) -> str:
    """Python text that sets limits of the process that runs it. It stands before all other text."""
    only = {name: value for name, value in limits.items() if name in NAMES}
    return f"""\
from dataclasses import replace
from kvstore.core import limits
limits.DEFAULT = replace(limits.DEFAULT, **{only!r})
"""


def launch(*verb: str, **limits: int) -> tuple[str, str]:
    """Arguments for Python, in the place of `-m kvstore VERB`, with other limits; flags may follow."""
    patient = PATIENT if limits.get("fetch_connect_ms") == OPEN_DEADLINES["fetch_connect_ms"] else ""
    text = f"{patient}import sys\nfrom kvstore.cli import main\nsys.argv[:1] = {['kvstore', *verb]!r}\nmain()\n"
    return "-c", set_limits(limits) + text
