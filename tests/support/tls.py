"""Folders of credentials as `tls_dir` takes them."""

from __future__ import annotations

from pathlib import Path

from kvstore.config.credentials import FILES


def write_secret(path: Path, data: bytes | str) -> None:
    """New content under a name, at once, as tools that rotate secrets write; 0600."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(data.encode() if isinstance(data, str) else data)
    new.rename(path)


def tls_folder(folder: Path, /, **contents: bytes | str) -> Path:
    """A folder with these files: `cert`, `key`, `ca`, `tokens`. It keeps what it has besides."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, data in contents.items():
        write_secret(folder / (name if name in FILES else f"{name}.pem"), data)
    return folder


def copied(folder: Path, source: Path, *names: str) -> Path:
    """A folder with some of the files of another: `cert`, `key`, `ca`, `tokens`."""
    files = {name: (source / (name if name in FILES else f"{name}.pem")).read_bytes() for name in names}
    return tls_folder(folder, **files)
