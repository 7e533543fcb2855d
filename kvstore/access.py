"""Who may ask for what over TCP: scopes, tokens, and the certificates of both ends.

The unix socket needs none of this: its directory and mode let its owner in, who may do everything.

A token file has a line for each token, `worker TOKEN` or `admin TOKEN`; `#` starts a comment. A daemon takes every
token in its file. A client sends the least that does: an admin token for admin verbs, a worker token for the rest.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.certificates import Validity, check_authorities, check_pair, warn_of_end
from kvstore.config import Config
from kvstore.errors import ConfigError
from kvstore.private import read_private

TOKEN_CHARACTERS_MIN = 32
# The common name of a client certificate that may use admin verbs. Any other that the CA signed is a worker's.
ADMIN_NAME = "kvstore-admin"
METADATA_KEY = "authorization"
# Under this key a client sends a random name of its own with each call, so that the daemon can count clients.
CLIENT_KEY = "kvstore-client"
BEARER = "Bearer "


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
