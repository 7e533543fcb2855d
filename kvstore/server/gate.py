"""The gate: which profile a store gets.

`kvstore calibrate` measures and records (`kvstore.quality`). A profile whose recorded result breaks the configured
limits is refused with the numbers, under every name that it has. One that was named, in the configuration or by a
session, and never measured is used, warned of once and listed in `stats`. `auto` takes the smallest that was measured
and passed: `safe` without any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.codecs.plausible import fault_of
from kvstore.codecs.profiles import AUTO, UNMEASURED, Profile, parse_profile
from kvstore.config import Config
from kvstore.core.keys import NamespaceInfo
from kvstore.engine.directory import QualityFiles
from kvstore.errors import ConfigError, InvalidRequestError
from kvstore.quality import Calibrated, Quality, QualityLimits

log = logging.getLogger(__name__)


# As many pairs of namespace and profile are logged and listed; every caller is told of each.
WARNED_MAX = 1000

NOT_MEASURED = "it was not measured on this model; run: kvstore calibrate --model PATH --profile "


@dataclass(frozen=True, slots=True)
class Choice:
    """The profile that a store gets, why it is not the one asked for, and what its caller should be warned of."""

    profile: Profile
    refused: str = ""
    warning: str = ""


def limits_of(config: Config) -> QualityLimits:
    """The limits that the configuration sets."""
    return QualityLimits(
        kl_mean_max=config.quality_kl_mean_max,
        kl_p99_max=config.quality_kl_p99_max,
        top1_min=config.quality_top1_min,
        nll_delta_max=config.quality_nll_delta_max,
        answer_loss_max=config.quality_answer_loss_max,
    )


class Gate:
    """Chooses profiles. Any thread may call; one look at a dictionary, after a namespace's first."""

    def __init__(self, files: QualityFiles, config: Config) -> None:
        """`config.profile` must be one that `parse_profile` knows."""
        self._files = files
        self._enabled = config.quality_gate
        self._default = config.profile
        self._limits = limits_of(config)
        self._lock = threading.Lock()
        self._warned: set[tuple[bytes, str]] = set()

    def choose(self, root: bytes, asked: str = "") -> Choice:
        """The profile for KV that comes into a namespace now; `asked` empty: the daemon's own.

        A refused default becomes the best that is allowed. What a session asked for by name is refused to it: then
        `profile` is what the daemon would use instead.
        """
        name = asked or self._default
        if name == AUTO:
            return Choice(self._smallest(root))
        profile = parse_profile(name)
        fault = self.fault(root, profile)
        if fault:
            self._warn(root, profile, "is refused", fault)
            return Choice(self._smallest(root), refused=f"profile {name} is refused for this model: {fault}")
        if not self._needs_measurement(root, profile):
            return Choice(profile)
        why = f"{NOT_MEASURED}{name}"
        self._warn(root, profile, "is used as asked for", why)
        return Choice(profile, warning=f"profile {name} is used as asked for: {why}")

    def fault(self, root: bytes, profile: Profile) -> str:
        """Why a profile may not be used in a namespace: it was measured and failed. Empty when it may."""
        if not self._enabled or profile.is_exact:
            return ""
        quality = self._result(root, profile)
        return self._limits.fault(quality) if quality else ""

    def calibrated(self, root: bytes) -> list[tuple[Quality, str]]:
        """What was measured in a namespace, and why each may not be used."""
        return self._judged(self._files.results(root).values())

    def all_calibrated(self, prefix: bytes) -> list[tuple[bytes, Calibrated, list[tuple[Quality, str]]]]:
        """The same for every namespace whose root starts with `prefix`."""
        found = self._files.all(prefix).items()
        return [(root, one, self._judged(one.results.values())) for root, one in found]

    def unmeasured(self, root: bytes) -> list[str]:
        """Profiles that were named for this namespace since the daemon started, and used without a measurement."""
        with self._lock:
            names = sorted(name for where, name in self._warned if where == root)
        return [name for name in names if self._needs_measurement(root, parse_profile(name))]

    def record(self, namespace: NamespaceInfo, quality: Quality) -> str:
        """Keep a result; why the profile is refused by it, or nothing. Blocks on disk.

        InvalidRequestError for what cannot be a measurement of this profile on this layout.
        """
        fault = fault_of(quality, namespace.layout)
        if fault:
            raise InvalidRequestError(f"the result for {quality.profile} is not taken: {fault}")
        self._files.record(namespace.root, quality, namespace.alias, namespace.engine)
        with self._lock:
            self._warned = {pair for pair in self._warned if pair[0] != namespace.root}
        return self._limits.fault(quality)

    def forget(self, prefix: bytes, profile: str) -> int:
        """Drop results, of all profiles when `profile` is empty; how many. Blocks on disk."""
        return self._files.forget(prefix, profile)

    def _judged(self, results: Iterable[Quality]) -> list[tuple[Quality, str]]:
        return [(one, self._limits.fault(one)) for one in sorted(results, key=lambda one: one.profile)]

    def _result(self, root: bytes, profile: Profile) -> Quality | None:
        """The measurement of these recipes, under whatever name."""
        return next((one for one in self._files.results(root).values() if one.spec == profile.spec), None)

    def _needs_measurement(self, root: bytes, profile: Profile) -> bool:
        """Whether using the profile is its user's risk."""
        trusted = not self._enabled or profile.is_exact or profile.spec in _TRUSTED
        return not trusted and self._result(root, profile) is None

    def _smallest(self, root: bytes) -> Profile:
        """Of what was measured and passes the one with the fewest bits; `safe` without any, unless that failed."""
        passing = [
            (quality.bits_per_value, name)
            for name, quality in self._files.results(root).items()
            if self._is_known(name, quality.spec) and not self._limits.fault(quality)
        ]
        if passing:
            return parse_profile(min(passing)[1])
        return next(profile for profile in map(parse_profile, UNMEASURED) if not self.fault(root, profile))

    @staticmethod
    def _is_known(name: str, spec: str) -> bool:
        """Whether this build still has a profile that was measured once, made of the same recipes."""
        try:
            return parse_profile(name).spec == spec
        except ConfigError:
            return False

    def _warn(self, root: bytes, profile: Profile, what: str, why: str) -> None:
        with self._lock:
            if (root, profile.name) in self._warned or len(self._warned) >= WARNED_MAX:
                return
            self._warned.add((root, profile.name))
        log.warning("namespace %s: profile %s %s: %s", root.hex()[:12], profile.name, what, why)


_TRUSTED = frozenset(parse_profile(name).spec for name in UNMEASURED)
