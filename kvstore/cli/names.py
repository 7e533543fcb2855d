"""Resolves names for read-only verbs: the leading hex digits of an id or key, or the alias of a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kvstore.cli.common import namespace_id
from kvstore.errors import NotFoundError

if TYPE_CHECKING:
    from kvstore.client.client import Client

NAMESPACES_MAX = 10_000
_ID = re.compile(r"(?:[0-9a-fA-F]{2}){1,32}")


def as_id(name: str) -> bytes:
    """The bytes of leading digits of an id; empty for a name that is none."""
    return bytes.fromhex(name) if _ID.fullmatch(name) else b""


def find_namespaces(namespaces: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Entries of the daemon whose alias is `name` or whose id starts with it."""
    prefix = as_id(name).hex()
    return [one for one in namespaces if one["alias"] == name or (prefix and one["id"].startswith(prefix))]


def require_namespace(client: Client, name: str) -> bytes:
    """The leading bytes of the id of the namespace with this alias, or of those whose id starts so.

    NotFoundError, with what there is, where that is none, or an alias that several have.
    """
    namespaces = client.list(limit=NAMESPACES_MAX)["namespaces"]
    prefix = namespace_id(name, namespaces)
    if not any(one["id"].startswith(prefix.hex()) for one in namespaces):
        raise NotFoundError(f"no namespace has the alias {name!r} or an id that starts so; see: kvstore ls")
    return prefix
