"""Where the remote store is: the address that `remote` sets, and the access to S3 that its usual variables give.

Credentials are those that other S3 tools use: the environment, then the profile of AWS_PROFILE in ~/.aws. They are
never part of a message, a repr or a log line.
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvstore.errors import ConfigError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[a-z0-9_][a-z0-9._-]*(/[a-z0-9_][a-z0-9._-]*)*")
# Names that no public resolver knows: mDNS, RFC 8375 and ICANN's name for private use.
_PRIVATE_SUFFIXES = (".local", ".localhost", ".internal", ".home.arpa")
REGION_DEFAULT = "us-east-1"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A folder (`folder` is set) or a bucket with the prefix of all names in it."""

    folder: str = ""
    bucket: str = ""
    prefix: str = ""

    def __str__(self) -> str:
        return f"file://{self.folder}" if self.folder else f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True)
class S3Access:
    """How to reach S3. `endpoint`: empty for AWS itself. Without keys the client looks for those of its machine."""

    endpoint: str = ""
    region: str = REGION_DEFAULT
    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    ca_file: str = ""


def parse_remote(text: str) -> RemoteAddress:
    """`file:///Volumes/nas/kv` or `s3://bucket/prefix`; ValueError says what is wrong."""
    parts = urlsplit(text)
    if parts.query or parts.fragment or parts.username or parts.password or parts.port:
        raise ValueError("write file:///folder or s3://bucket/prefix; credentials come from the environment")
    if parts.scheme == "file":
        folder = unquote(parts.path)
        if parts.netloc not in ("", "localhost") or not os.path.isabs(folder) or "\0" in folder:
            raise ValueError("write the path of a mounted folder, as in file:///Volumes/nas/kv")
        folder = os.path.normpath(folder)
        if folder.strip("/") == "":
            raise ValueError("the root of the file system is no folder to share")
        return RemoteAddress(folder=folder)
    if parts.scheme == "s3":
        prefix = parts.path.strip("/")
        if not _BUCKET.fullmatch(parts.netloc):
            raise ValueError("not the name of a bucket; write s3://bucket/prefix")
        if prefix and not _PREFIX.fullmatch(prefix):
            raise ValueError("a prefix has small letters, digits, and . _ - / between them")
        return RemoteAddress(bucket=parts.netloc, prefix=prefix)
    raise ValueError("write file:///folder or s3://bucket/prefix")


def is_private(endpoint: str) -> bool:
    """Whether an endpoint is of this machine or a private network, by its URL alone: nothing is resolved.

    Addresses that are not routed in the internet are private, and names without a dot or under the suffixes of private
    networks. AWS itself, the empty endpoint, is not.
    """
    host = (urlsplit(endpoint).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return bool(host) and ("." not in host or host.endswith(_PRIVATE_SUFFIXES))
    mapped = getattr(address, "ipv4_mapped", None)
    return not (mapped or address).is_global


def require_allowed(address: RemoteAddress, access: S3Access, wan: bool) -> None:
    """ConfigError where a bucket is reached over the internet and `remote_wan` does not allow it."""
    if address.bucket and not wan and not is_private(access.endpoint):
        where = access.endpoint or "AWS itself (no AWS_ENDPOINT_URL is set)"
        raise ConfigError(
            f"remote: the endpoint of {address} is {where}, not a private address. Every request and byte may be "
            "billed; if you want that, set remote_wan = true"
        )


def s3_access(environ: Mapping[str, str] | None = None) -> S3Access:
    """Access by the usual variables, then by the files in ~/.aws. ConfigError where these give no keys.

    Files that need a program or a log-in to give keys (SSO, credential_process, roles) are not understood: export the
    keys that they give.
    """
    environ = os.environ if environ is None else environ
    home = Path(environ.get("HOME") or "/")
    profile = environ.get("AWS_PROFILE", "")
    name = profile or "default"
    keys = _section(environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws/credentials", name)
    more = _section(
        environ.get("AWS_CONFIG_FILE") or home / ".aws/config", name if name == "default" else f"profile {name}"
    )
    if profile and keys is None and more is None:
        raise ConfigError(f"AWS_PROFILE: there is no profile {profile!r} in ~/.aws/credentials or ~/.aws/config")
    said = {**(more or {}), **(keys or {})}
    own = environ if environ.get("AWS_ACCESS_KEY_ID") else {}
    ours = bool(own)
    if not ours and not said.get("aws_access_key_id"):
        if profile:
            raise ConfigError(f"AWS_PROFILE: the profile {profile!r} has no aws_access_key_id; export the keys instead")
        # Not tried without: the S3 client would ask for the keys of a cloud machine at a link-local address.
        raise ConfigError("remote: no keys for the bucket; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or said.get("endpoint_url", "")
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise ConfigError("AWS_ENDPOINT_URL: write http://host:port or https://host")
    return S3Access(
        endpoint,
        environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or said.get("region") or REGION_DEFAULT,
        own.get("AWS_ACCESS_KEY_ID", "") if ours else said.get("aws_access_key_id", ""),
        own.get("AWS_SECRET_ACCESS_KEY", "") if ours else said.get("aws_secret_access_key", ""),
        own.get("AWS_SESSION_TOKEN", "") if ours else said.get("aws_session_token", ""),
        environ.get("AWS_CA_BUNDLE") or said.get("ca_bundle", ""),
    )


def _section(path: Path | str, name: str) -> dict[str, str] | None:
    """A section of a file in ~/.aws; None where there is none."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(Path(path).expanduser())
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from None  # its text may hold a secret
    return dict(parser[name]) if parser.has_section(name) else None
