"""Resolves names: the leading hex digits of an id or key, or the alias of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.common import shortener
from kvstore.errors import InvalidRequestError, NotFoundError

if TYPE_CHECKING:
    from kvstore.client.client import Client

NAMESPACES_MAX = 10_000
# Namespaces that an error names at most.
NAMED_MAX = 5
_ID = re.compile(r"(?:[0-9a-fA-F]{2}){1,32}")
_DIGITS = re.compile(r"[0-9a-fA-F]{1,64}")


def as_id(name: str) -> bytes:
    """The bytes of leading digits of an id; empty for a name that is none."""
    return bytes.fromhex(name) if _ID.fullmatch(name) else b""


def id_option(text: str) -> bytes:
    """The bytes that the leading hex digits of a namespace id or block key stand for; a usage error otherwise."""
    if not (prefix := as_id(text)):
        raise click.BadParameter(f"{text!r} is not an id; give an even number of leading hex digits, 64 at most")
    return prefix


def block_digests(block: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a listed block that has a digest: its ids, its keys and its recipes, but no path."""
    yield from (block["key"], block["parent"], block["namespace_id"], *block["recipes"])


def find_namespaces(namespaces: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """Entries of the daemon whose alias is `name`, then those whose id starts with it: any number of hex digits."""
    digits = name.lower() if _DIGITS.fullmatch(name) else ""
    found = [one for one in namespaces if one["alias"] == name or (digits and one["id"].startswith(digits))]
    return sorted(found, key=lambda one: one["alias"] != name)


def nothing_named(name: str) -> NotFoundError:
    """No namespace has this alias, and no id or key starts so; keys are looked up by whole bytes, of two digits."""
    if _DIGITS.fullmatch(name) and not as_id(name):
        return NotFoundError(f"nothing is named {name!r}; a key is given by an even number of digits; see: kvstore ls")
    return NotFoundError(f"no namespace has the alias {name!r}, and no id or key starts so; see: kvstore ls")


def namespace_id(text: str, namespaces: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a namespace's id, given by leading digits or by its alias; `namespaces` are what the daemon has.

    An id need not be there: then these are the leading bytes as given. InvalidRequestError for a name that several
    have, NotFoundError for an alias that none has, both with the candidates.
    """
    if not text:
        raise InvalidRequestError("a namespace is given by leading digits of its id, or by its alias")
    # An alias may look like the beginning of an id; then both are meant.
    found = find_namespaces(namespaces, text)
    if len(found) == 1:
        return bytes.fromhex(found[0]["id"])
    if found:
        raise InvalidRequestError(
            f"{text!r} names {len(found)} namespaces, {_listed(found)}: give more digits of an id"
        )
    if prefix := as_id(text):
        return prefix
    aliases = {one["alias"] for one in namespaces}
    near = difflib.get_close_matches(text, aliases, n=NAMED_MAX)
    close = [one for one in namespaces if one["alias"] in near]
    there = f"there are {_listed(close or namespaces)}" if namespaces else "the store is empty"
    raise NotFoundError(f"no namespace has the id or alias {text!r}; {there}")


def _listed(namespaces: Sequence[Mapping[str, Any]]) -> str:
    """Ids and aliases of the first ones, for a sentence."""
    more = f" and {len(namespaces) - NAMED_MAX} more" if len(namespaces) > NAMED_MAX else ""
    short = shortener(one["id"] for one in namespaces)
    return ", ".join(f"{short(one['id'])} ({one['alias'] or '-'})" for one in namespaces[:NAMED_MAX]) + more


def require_namespace(client: Client, name: str) -> bytes:
    """The id of the namespace with this alias, or whose id starts so. Raises as `namespace_id`, and NotFoundError for
    an id that is not there."""
    namespaces = client.list(limit=NAMESPACES_MAX)["namespaces"]
    prefix = namespace_id(name, namespaces)
    if not any(one["id"].startswith(prefix.hex()) for one in namespaces):
        raise NotFoundError(f"no namespace has the alias {name!r} or an id that starts so; see: kvstore ls")
    return prefix


def block_key(client: Client, prefix: bytes) -> bytes:
    """The whole key of the one block whose key starts so. NotFoundError where none does, InvalidRequestError where
    several do, with the candidates."""
    found = [one["key"] for one in client.show(prefix)["blocks"]]
    if not found:
        raise NotFoundError(f"no key starts with {prefix.hex()}; see: kvstore ls")
    if len(found) > 1:
        some = ", ".join(map(shortener(found), found[:NAMED_MAX]))
        raise InvalidRequestError(f"{prefix.hex()} begins the keys of several blocks ({some}): give more digits")
    return bytes.fromhex(found[0])
