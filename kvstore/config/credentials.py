"""Who may ask for what over TCP: scopes, tokens, and the certificates of both ends.

The unix socket needs none of this: its directory and mode let its owner in, who may do everything.

A token file has a line for each token, `worker TOKEN` or `admin TOKEN`; `#` starts a comment. A daemon takes every
token in its file. A client sends the least that does: an admin token for admin verbs, a worker token for the rest.
"""

from __future__ import annotations

import datetime
import enum
import functools
import hashlib
import hmac
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.config.certificates import Validity, check_authorities, check_pair, warn_of_end
from kvstore.config.config import Config
from kvstore.config.private_files import read_private
from kvstore.errors import ConfigError, DirectoryError

TOKEN_CHARACTERS_MIN = 32
# The common name of a client certificate that may use admin verbs. Any other that the CA signed is a worker's.
ADMIN_NAME = "kvstore-admin"
METADATA_KEY = "authorization"
# Under this key a client sends a random name of its own with each call, so that the daemon can count clients.
CLIENT_KEY = "kvstore-client"
BEARER = "Bearer "
FILE_KEYS = ("token_file", "tls_cert", "tls_key", "tls_ca")
TELL_END_EVERY = datetime.timedelta(days=1)

log = logging.getLogger(__name__)


class Scope(enum.IntEnum):
    """What a caller may do; each scope includes those before it."""

    NOTHING = 0
    WORKER = 1  # match, fetch, store, report
    ADMIN = 2  # stats, list, show, evict, check


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A shared secret and its scope. Shows neither when printed."""

    scope: Scope
    secret: str


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """What one end of a TCP connection holds, read and checked. PEM bytes; empty where not configured."""

    chain: bytes = b""
    key: bytes = b""
    ca: bytes = b""
    tokens: tuple[Token, ...] = ()
    validities: tuple[Validity, ...] = ()


def load_credentials(config: Config) -> Credentials:
    """Read what the configuration names. DirectoryError for a file that is missing or open to others, ConfigError for
    one that is not what it should be. What has expired, or soon will, is logged. Nothing is read for a unix socket."""
    if config.address.path:
        return Credentials()
    chain, ca = _public("tls_cert", config.tls_cert), _public("tls_ca", config.tls_ca)
    key = read_private(config.tls_key) if config.tls_key else b""
    validities = []
    if chain and key:
        validities.append(check_pair(config.tls_cert, chain, config.tls_key, key))
    if ca:
        validities.append(check_authorities(config.tls_ca, ca))
    warn_of_end(tuple(validities))
    return Credentials(
        chain=chain,
        key=key,
        ca=ca,
        validities=tuple(validities),
        tokens=parse_tokens(read_private(config.token_file), config.token_file) if config.token_file else (),
    )


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class CredentialFiles:
    """The files of one end's credentials, read again when they have changed. Any thread may call.

    A change that cannot be used (half written, open to others, no pair) leaves in force what was read before, until the
    files change once more. What is said of a change is one line in the log.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[Config], Credentials] = load_credentials,
        clock: Callable[[], datetime.datetime] = _utc_now,
    ) -> None:
        """Reads the files; raises what `load` raises."""
        self._paths = {key: path for key in FILE_KEYS if (path := getattr(config, key))}
        if config.address.path:
            self._paths = {}
        self._load = functools.partial(load, config)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = self._look()  # before they are read: what changes meanwhile is found by the next look
        self._complaint = ""
        self.current = self._load()
        self._told = clock()

    @property
    def is_empty(self) -> bool:
        """Whether no files are configured, so that nothing ever changes."""
        return not self._paths

    def _look(self) -> dict[str, tuple[int, ...]]:
        """What tells one state of each file from the next; empty for one that is not there."""
        seen: dict[str, tuple[int, ...]] = {}
        for key, path in self._paths.items():
            try:
                info = os.stat(path)
            except OSError:
                seen[key] = ()
                continue
            seen[key] = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        return seen

    def renew(self) -> bool:
        """Look at the files, and read them if they have changed; whether `current` is another now. Reads from disks."""
        with self._lock:
            seen, before = self._look(), self._seen
            if seen == before:
                self._complain()
                return False
            self._seen, self._complaint = seen, ""
            changed = ", ".join(key for key in seen if seen[key] != before[key])
            try:
                credentials = self._load()
            except (ConfigError, DirectoryError) as error:
                # Files that belong together change one after the other: said if they are the same at the next look.
                self._complaint = (
                    f"{changed} changed and cannot be used, so what was read before stays in force: {error}"
                )
                return False
            self._told = self._clock()
            if credentials == self.current:
                return False
            self.current = credentials
            log.info("%s changed, and is in force as it is now", changed)
            return True

    def _complain(self) -> None:
        if self._complaint:
            log.warning("%s", self._complaint)
            self._complaint = ""

    def tell_end(self) -> None:
        """Once a day log what has expired or soon will. Reads nothing, so it may be called often."""
        if not self.current.validities or self._clock() - self._told < TELL_END_EVERY:
            return
        self._told = self._clock()
        warn_of_end(self.current.validities)


def _public(key: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path}: {error.strerror}") from error


def parse_tokens(text: bytes, path: str) -> tuple[Token, ...]:
    """The tokens of a token file; ConfigError names the line, and never what stands in it."""
    tokens: list[Token] = []
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in ("worker", "admin"):
            raise ConfigError(f"token_file: {path}, line {number}: write `worker TOKEN` or `admin TOKEN`")
        if len(words[1]) < TOKEN_CHARACTERS_MIN or not (words[1].isascii() and words[1].isprintable()):
            raise ConfigError(
                f"token_file: {path}, line {number}: a token has at least {TOKEN_CHARACTERS_MIN} ASCII characters"
            )
        tokens.append(Token(Scope[words[0].upper()], words[1]))
    if not tokens:
        raise ConfigError(f"token_file: {path} has no token")
    return tuple(tokens)


def scope_of_token(presented: str, tokens: Sequence[Token]) -> Scope:
    """The scope that a presented secret gives; NOTHING for one that is not there. Takes the same time for all.

    Digests are compared, so that not even the length of a token can be measured.
    """
    found = Scope.NOTHING
    digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
    for token in tokens:
        if hmac.compare_digest(digest, hashlib.sha256(token.secret.encode()).digest()):
            found = max(found, token.scope)
    return found


def token_to_present(tokens: Sequence[Token], scope: Scope) -> str:
    """The secret with the least scope that is enough, else the best there is; empty without any."""
    enough = [token for token in tokens if token.scope >= scope]
    chosen = min(enough, key=lambda token: token.scope) if enough else max(tokens, key=lambda t: t.scope, default=None)
    return chosen.secret if chosen else ""
