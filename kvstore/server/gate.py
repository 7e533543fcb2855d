"""The gate: which profile a store gets. A lossy profile is used on a model only after it was measured on it.

`kvstore calibrate` measures and records (`kvstore.quality`). Until then a namespace is kept in `safe`. Profiles whose
recorded result breaks the configured limits are refused with the numbers; `auto` takes the smallest that passes.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from kvstore.codecs.profiles import AUTO, UNMEASURED, Profile, parse_profile
from kvstore.config import Config
from kvstore.engine.quality import QualityFiles
from kvstore.errors import ConfigError
from kvstore.quality import Quality, QualityLimits

log = logging.getLogger(__name__)


# So many refusals are logged; whoever asks is told of each.
WARNED_MAX = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """The profile that a store gets, and why it is not the one asked for."""

    profile: Profile
    refused: str = ""


class Gate:
    """Chooses profiles. Any thread may call; one look at a dictionary, after a namespace's first."""

    def __init__(self, files: QualityFiles, config: Config) -> None:
        """`config.profile` must be one that `parse_profile` knows."""
        self._files = files
        self._enabled = config.quality_gate
        self._default = config.profile
        self._limits = QualityLimits(
            kl_mean_max=config.quality_kl_mean_max,
            kl_p99_max=config.quality_kl_p99_max,
            top1_min=config.quality_top1_min,
            nll_delta_max=config.quality_nll_delta_max,
            needle_loss_max=config.quality_needle_loss_max,
        )
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
        if not fault:
            return Choice(profile)
        self._warn(root, profile, fault)
        return Choice(self._smallest(root), f"profile {name} is refused for this model: {fault}")

    def fault(self, root: bytes, profile: Profile) -> str:
        """Why a profile may not be used in a namespace; empty when it may."""
        if not self._enabled or profile.is_exact or profile.name in UNMEASURED:
            return ""
        quality = self._files.results(root).get(profile.name)
        if quality is None or quality.spec != profile.spec:
            return "it was not measured on it; run: kvstore calibrate --model PATH"
        return self._limits.fault(quality)

    def results(self, root: bytes) -> list[tuple[Quality, str]]:
        """What was measured in a namespace, and why each may not be used."""
        return [(quality, self._limits.fault(quality)) for _, quality in sorted(self._files.results(root).items())]

    def record(self, root: bytes, quality: Quality) -> str:
        """Keep a result; why the profile is refused by it, or nothing. Blocks on disk."""
        self._files.record(root, quality)
        return self._limits.fault(quality)

    def _smallest(self, root: bytes) -> Profile:
        """Of what was measured and passes the one with the fewest bits; `safe` without any."""
        passing = [
            (quality.bits_per_value, name)
            for name, quality in self._files.results(root).items()
            if self._is_known(name) and not self.fault(root, parse_profile(name))
        ]
        return parse_profile(min(passing)[1] if passing else UNMEASURED[0])

    @staticmethod
    def _is_known(name: str) -> bool:
        """Whether this build still has a profile that was measured once."""
        try:
            parse_profile(name)
        except ConfigError:
            return False
        return True

    def _warn(self, root: bytes, profile: Profile, fault: str) -> None:
        with self._lock:
            if (root, profile.name) in self._warned or len(self._warned) >= WARNED_MAX:
                return
            self._warned.add((root, profile.name))
        log.warning("namespace %s: profile %s is refused: %s", root.hex()[:12], profile.name, fault)
