"""Credentials for TCP: scopes, tokens, and the certificates of both ends.

The unix socket needs no credentials: its directory and mode admit only its owner, who may do everything.

Both ends have a folder of the same shape, `tls_dir`; `kvstore config cert` makes one for each. A file that is not there
when the process begins is not used:

    cert.pem   certificate chain of this end: the daemon's, or a client's where the daemon asks for one
    key.pem    its private key, 0600
    ca.pem     CAs that the other end's certificate must come from; in a daemon: clients must have one. A client without
               it trusts the system's CAs
    tokens     0600, a line for each token, `worker TOKEN` or `admin TOKEN`; `#` starts a comment

A daemon takes every token in its file. A client sends the least that does: an admin token for admin verbs, a worker
token for the rest.
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
from collections.abc import Callable, Mapping, Sequence
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
# A client whose name begins so only looks whether the store works (`kvstore doctor`): nothing that it does is counted.
PROBE = "probe-"
# And under this one the number of its process, for people.
PID_KEY = "kvstore-pid"
BEARER = "Bearer "
CERT, KEY, CA, TOKENS = FILES = ("cert.pem", "key.pem", "ca.pem", "tokens")
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
    """Validated credentials of one end of a TCP connection. PEM bytes; empty if not configured."""

    chain: bytes = b""
    key: bytes = b""
    ca: bytes = b""
    tokens: tuple[Token, ...] = ()
    validities: tuple[Validity, ...] = ()


def credential_files(config: Config) -> dict[str, Path]:
    """The files that are in `tls_dir` now, by name; none for a unix socket. ConfigError when they cannot be used."""
    if config.address.path or not config.tls_dir:
        return {}
    folder = Path(config.tls_dir)
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"tls_dir: cannot read {folder}: {error.strerror}") from error
    found = {name: folder / name for name in FILES if name in there}
    if not found:
        raise ConfigError(f"tls_dir: {folder} has none of {', '.join(FILES)}; `kvstore config cert` makes them")
    for name, other in ((CERT, KEY), (KEY, CERT)):
        if name in found and other not in found:
            raise ConfigError(f"tls_dir: {folder} has {name} and no {other}; they go together")
    return found


def speaks_tls(config: Config, credentials: Credentials) -> bool:
    """Whether a client encrypts: always on TCP, unless `insecure_tcp` allows it not to and it has nothing for TLS."""
    return not config.address.path and (bool(credentials.chain or credentials.ca) or not config.insecure_tcp)


def load_credentials(config: Config, files: Mapping[str, Path] | None = None) -> Credentials:
    """Read these files; None: those that `tls_dir` has now, none for a unix socket.

    DirectoryError for a file that is missing or open to others, ConfigError for one that is not what it should be. What
    has expired, or soon will, is logged.
    """
    files = credential_files(config) if files is None else files
    chain = key = ca = b""
    tokens: tuple[Token, ...] = ()
    validities = []
    if CERT in files:
        chain, key = _public(files[CERT]), read_private(files[KEY])
        validities.append(check_pair(str(files[CERT]), chain, str(files[KEY]), key))
    if CA in files:
        ca = _public(files[CA])
        validities.append(check_authorities(str(files[CA]), ca))
    if TOKENS in files:
        tokens = parse_tokens(read_private(files[TOKENS]), str(files[TOKENS]))
    warn_of_end(tuple(validities))
    return Credentials(chain=chain, key=key, ca=ca, tokens=tokens, validities=tuple(validities))


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class CredentialFiles:
    """The files of one end's credentials, read again when they have changed. Any thread may call.

    A change that cannot be used (half written, open to others, no pair, gone) leaves in force what was read before,
    until the files change once more: a file that is removed never opens the door. One that was not there at the start
    is not looked for. What is said of a change is one line in the log.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[Config, Mapping[str, Path]], Credentials] = load_credentials,
        clock: Callable[[], datetime.datetime] = _utc_now,
    ) -> None:
        """Reads the files; raises what `load` raises."""
        self._paths = credential_files(config)
        self._load = functools.partial(load, config, self._paths)
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
        """Signature of each file's state, to notice changes; empty for a missing file."""
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


def _public(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls_dir: cannot read {path}: {error.strerror}") from error


def parse_tokens(text: bytes, path: str) -> tuple[Token, ...]:
    """The tokens of a token file; ConfigError names the line, and never what stands in it."""
    tokens: list[Token] = []
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in ("worker", "admin"):
            raise ConfigError(f"tls_dir: {path}, line {number}: write `worker TOKEN` or `admin TOKEN`")
        if len(words[1]) < TOKEN_CHARACTERS_MIN or not (words[1].isascii() and words[1].isprintable()):
            raise ConfigError(
                f"tls_dir: {path}, line {number}: a token has at least {TOKEN_CHARACTERS_MIN} ASCII characters"
            )
        tokens.append(Token(Scope[words[0].upper()], words[1]))
    if not tokens:
        raise ConfigError(f"tls_dir: {path} has no token")
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
