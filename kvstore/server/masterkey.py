"""The master key of encrypted namespaces: 32 bytes out of a private file or the system's keychain."""

from __future__ import annotations

import importlib

from kvstore.config import Config
from kvstore.config.private_files import read_private
from kvstore.errors import ConfigError

KEYCHAIN_SERVICE = "kvstore"
KEY_BYTES = 32
_KEYCHAIN = "keychain:"


def load_master_key(config: Config) -> bytes:
    """The key that `encryption_key` names; nothing when it names none.

    Raises ConfigError when there is no such key or it is not 64 hex digits, DirectoryError for a file that others can
    read.
    """
    named = config.encryption_key
    if not named:
        return b""
    in_keychain = named.startswith(_KEYCHAIN)
    text = _from_keychain(named.removeprefix(_KEYCHAIN)) if in_keychain else read_private(named).decode("latin-1")
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"encryption_key: {named} does not hold a key of {2 * KEY_BYTES} hex digits")
    return key


def _from_keychain(account: str) -> str:
    try:
        keyring = importlib.import_module("keyring")
    except ImportError as error:
        raise ConfigError("encryption_key: keychain:NAME needs the extra: pip install 'kvstore[keychain]'") from error
    try:
        found = keyring.get_password(KEYCHAIN_SERVICE, account)
    except keyring.errors.KeyringError as error:
        raise ConfigError(f"encryption_key: the keychain does not answer: {error}") from error
    if not found:
        raise ConfigError(
            f"encryption_key: the keychain has no key {account}; make one with: "
            f'keyring set {KEYCHAIN_SERVICE} {account}  (and paste the output of "openssl rand -hex 32")'
        )
    return str(found)
