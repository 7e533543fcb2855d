"""Where a remote store is, who may be asked for it, and with which credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.config.remote_address import RemoteAddress, S3Access, is_private, parse_remote, require_allowed, s3_access
from kvstore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("file:///Volumes/nas/kv", RemoteAddress(folder="/Volumes/nas/kv")),
        ("file://localhost/mnt/a%20b/", RemoteAddress(folder="/mnt/a b")),
        ("s3://bucket", RemoteAddress(bucket="bucket")),
        ("s3://my.bucket-1/a/b/", RemoteAddress(bucket="my.bucket-1", prefix="a/b")),
    ],
)
def test_addresses_are_read(text: str, address: RemoteAddress) -> None:
    """And shown as they are written."""
    assert parse_remote(text) == address
    assert parse_remote(str(address).replace(" ", "%20")) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/mnt/kv",
        "file://host/share",
        "file:///",
        "file:relative",
        "http://x/y",
        "s3://",
        "s3://B/x",
        "s3://user:key@bkt/x",
        "s3://bucket/A b",
        "s3://bucket/../x",
        "s3://bucket:80/x",
        "s3://bucket?region=x",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    """Keys in an address would be logged."""
    with pytest.raises(ValueError, match=r"file:///|bucket|prefix|folder"):
        parse_remote(text)


@pytest.mark.parametrize(
    ("endpoint", "private"),
    [
        ("http://127.0.0.1:8333", True),
        ("http://[::1]:8333", True),
        ("http://10.1.2.3", True),
        ("http://192.168.1.10:9000", True),
        ("http://172.16.0.1", True),
        ("http://169.254.1.1", True),
        ("http://100.64.0.1", True),
        ("http://[fd00::1]:9000", True),
        ("http://[fe80::1%25en0]:9000", True),
        ("http://[::ffff:10.0.0.1]", True),
        ("http://localhost:9000", True),
        ("http://nas", True),
        ("http://nas.local.:9000", True),
        ("http://garage.home.arpa", True),
        ("", False),
        ("https://s3.eu-central-1.amazonaws.com", False),
        ("https://8.8.8.8", False),
        ("https://[2a00:1450::1]", False),
        ("https://[::ffff:8.8.8.8]", False),
        ("https://10.0.0.1.example.com", False),
        ("https://local.example.com", False),
        ("https://account.r2.cloudflarestorage.com", False),
    ],
)
def test_what_may_be_billed_must_be_allowed(endpoint: str, private: bool) -> None:
    """By the URL alone. A folder is mounted by people, who know what it costs."""
    bucket, access = RemoteAddress(bucket="bucket"), S3Access(endpoint)
    assert is_private(endpoint) == private
    require_allowed(bucket, access, wan=True)
    require_allowed(RemoteAddress(folder="/share"), access, wan=False)
    if private:
        require_allowed(bucket, access, wan=False)
    else:
        with pytest.raises(ConfigError, match="remote_wan"):
            require_allowed(bucket, access, wan=False)


CREDENTIALS = """\
[default]
aws_access_key_id = id-default
aws_secret_access_key = secret-default
[lab]
aws_access_key_id = id-lab
aws_secret_access_key = secret-lab
aws_session_token = token-lab
"""
CONFIG = """\
[default]
region = eu-west-1
[profile lab]
region = eu-central-1
endpoint_url = http://10.0.0.5:3900
[profile sso]
sso_session = corp
"""


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with files in ~/.aws."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws/config").write_text(CONFIG)
    return {"HOME": str(tmp_path)}


def test_access_is_that_of_other_tools(home: dict[str, str]) -> None:
    """The environment, then the profile."""
    assert s3_access(home) == S3Access("", "eu-west-1", "id-default", "secret-default")
    lab = s3_access({**home, "AWS_PROFILE": "lab"})
    assert lab == S3Access("http://10.0.0.5:3900", "eu-central-1", "id-lab", "secret-lab", "token-lab")
    own = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "http://nas:1"}
    assert s3_access({**home, **own, "AWS_REGION": "x"}) == S3Access("http://nas:1", "x", "id", "secret")
    assert s3_access({**home, **own, "AWS_ENDPOINT_URL_S3": "http://b"}).endpoint == "http://b"
    assert "secret" not in repr(lab) and "id-lab" not in repr(lab) and "token" not in repr(lab)


def test_what_gives_no_keys_is_an_error(home: dict[str, str]) -> None:
    """Not a store without them. A file that is damaged is not shown."""
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        s3_access({"HOME": "/nowhere"})
    for profile in ("none", "sso"):
        with pytest.raises(ConfigError, match=profile):
            s3_access({**home, "AWS_PROFILE": profile})
    with pytest.raises(ConfigError, match="ENDPOINT"):
        s3_access({**home, "AWS_ENDPOINT_URL": "nas:9000"})
    Path(home["HOME"], ".aws/credentials").write_text("aws_secret_access_key = secret-text\n")
    with pytest.raises(ConfigError) as caught:
        s3_access(home)
    assert "secret-text" not in str(caught.value)
