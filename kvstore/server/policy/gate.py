"""The quality gate: chooses the profile for each store.

`kvstore calibrate` measures profiles, decides which pass and records that (`kvstore.quality`); the gate reads the
records. It refuses a profile that failed, under every name of it, and quotes the numbers. A profile that the
configuration or a session names but that was never measured is used, with one warning and an entry in `stats`. `auto`
is `safe` while the store has room, and the smallest profile that passed when it fills up (`pressure.py`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvstore.codecs.plausible import fault_of
from kvstore.codecs.profiles import AUTO, SMALL, SMALL_ELSE, UNMEASURED, Profile, parse_profile
from kvstore.core.keys import NamespaceInfo
from kvstore.engine.directory import QualityFiles
from kvstore.errors import ConfigError, InvalidRequestError
from kvstore.quality import Calibrated, Verdict

log = logging.getLogger(__name__)


# Limit on the pairs of namespace and profile that are logged and listed. Callers are warned in any case.
WARNED_MAX = 1000

NOT_MEASURED = "it was not measured on this model; run: kvstore calibrate --model PATH --profile "


NO_BASIS = "its basis is not in the store (any more): the last block that needed it takes it along; calibrate again"


@dataclass(frozen=True, slots=True)
class ProfileChoice:
    """The profile chosen for a store. `refused`: why it is not the requested one. `warning`: a text for the caller.

    `auto`: the session did not name it, so that what is stored with it may be re-encoded with a smaller one, once.
    `smallest`: it is that one already.
    """

    profile: Profile
    refused: str = ""
    warning: str = ""
    auto: bool = False
    smallest: bool = False


class Gate:
    """Chooses profiles. Any thread may call. After the first call for a namespace a choice is a dictionary look-up."""

    def __init__(
        self,
        files: QualityFiles,
        default: str,
        fills_up: Callable[[], bool] = lambda: False,
        has_basis: Callable[[bytes, Iterable[bytes]], bool] = lambda root, digests: True,
    ) -> None:
        """`default`: the profile for sessions that name none; a name that `parse_profile` accepts.

        `fills_up`: whether the store has so little room left that `auto` takes the smallest profile. `has_basis`:
        whether a namespace has all files of these digests.
        """
        self._files = files
        self._fills_up = fills_up
        self._has_basis = has_basis
        self._default = default
        self._lock = threading.Lock()
        self._warned: set[tuple[bytes, str]] = set()

    @property
    def default_profile(self) -> str:
        """The profile that is configured."""
        return self._default

    def choose(self, root: bytes, asked: str = "") -> ProfileChoice:
        """The profile for KV that comes into a namespace now; `asked` empty: the daemon's own.

        A refused default becomes the best that is allowed. What a session asked for by name is refused to it: then
        `profile` is what the daemon would use instead.
        """
        name = asked or self._default
        if name == AUTO:
            return self._choose_auto(root)
        profile = self._small(root) if name == SMALL else parse_profile(name)
        fault = self.fault(root, profile)
        if fault:
            self._warn(root, profile, "is refused", fault)
            return ProfileChoice(self._smallest(root), refused=f"profile {name} is refused for this model: {fault}")
        if not self._needs_measurement(root, profile):
            return ProfileChoice(profile)
        why = f"{NOT_MEASURED}{name}"
        self._warn(root, profile, "is used as asked for", why)
        return ProfileChoice(profile, warning=f"profile {name} is used as asked for: {why}")

    def _small(self, root: bytes) -> Profile:
        """The calibrated point with the fewest bits that may be used; what stands in for it where there is none."""
        names = [
            (one.quality.bits_per_value, name)
            for name, one in self._files.results(root).items()
            if self._is_known(name, one.quality.spec) and parse_profile(name).references
        ]
        passing = (parse_profile(name) for _, name in sorted(names))
        return next((one for one in passing if not self.fault(root, one)), parse_profile(SMALL_ELSE))

    def _choose_auto(self, root: bytes) -> ProfileChoice:
        smaller = self.smaller(root) if self._fills_up() else None
        return ProfileChoice(smaller or self._roomy(root), auto=True, smallest=smaller is not None)

    def smaller(self, root: bytes) -> Profile | None:
        """The profile with the fewest bits that passed, where it has fewer than `auto` takes while there is room."""
        smallest = self._smallest(root)
        return smallest if smallest.fidelity < self._roomy(root).fidelity else None

    def fault(self, root: bytes, profile: Profile) -> str:
        """Why a profile may not be used in a namespace: it was measured and failed, or its basis is not there.

        Empty when it may.
        """
        if profile.references and not self._has_basis(root, profile.references):
            return NO_BASIS
        verdict = None if profile.is_exact else self._result(root, profile)
        return verdict.fault if verdict else ""

    def calibrated(self, root: bytes) -> list[Verdict]:
        """Measurements of a namespace by profile name."""
        return [one for _, one in sorted(self._files.results(root).items())]

    def all_calibrated(self, prefix: bytes) -> list[tuple[bytes, Calibrated]]:
        """Measurements of all namespaces whose root starts with `prefix`."""
        return list(self._files.all(prefix).items())

    def unmeasured(self, root: bytes) -> list[str]:
        """Profiles that were named for this namespace since the daemon started, and used without a measurement."""
        with self._lock:
            names = sorted(name for where, name in self._warned if where == root)
        return [name for name in names if self._needs_measurement(root, parse_profile(name))]

    def record(self, namespace: NamespaceInfo, verdict: Verdict) -> str:
        """Keep a verdict; why the profile is refused by it, or nothing. Blocks on disk.

        InvalidRequestError for what cannot be a measurement of this profile on this layout.
        """
        fault = fault_of(verdict.quality, namespace.layout)
        if fault:
            raise InvalidRequestError(f"the result for {verdict.quality.profile} is not taken: {fault}")
        self._files.record(namespace.root, verdict, namespace.alias, namespace.engine)
        with self._lock:
            self._warned = {pair for pair in self._warned if pair[0] != namespace.root}
        return verdict.fault

    def forget(self, prefix: bytes, profile: str) -> int:
        """Drop results, of all profiles when `profile` is empty; how many. Blocks on disk."""
        return self._files.forget(prefix, profile)

    def _result(self, root: bytes, profile: Profile) -> Verdict | None:
        """The verdict on these recipes, under whatever name."""
        return next((one for one in self._files.results(root).values() if one.quality.spec == profile.spec), None)

    def _needs_measurement(self, root: bytes, profile: Profile) -> bool:
        """Whether using the profile is its user's risk."""
        trusted = profile.is_exact or profile.spec in _TRUSTED
        return not trusted and self._result(root, profile) is None

    def _smallest(self, root: bytes) -> Profile:
        """The profile with the fewest bits that passed; without one what `auto` takes while there is room."""
        passing = [
            (one.quality.bits_per_value, name)
            for name, one in self._files.results(root).items()
            if one.passed and self._is_known(name, one.quality.spec) and not self.fault(root, parse_profile(name))
        ]
        if passing:
            return parse_profile(min(passing)[1])
        return self._roomy(root)

    def _roomy(self, root: bytes) -> Profile:
        """`safe`, unless that failed."""
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
