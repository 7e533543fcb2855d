"""Names of objects in the remote store. They follow from keys alone, so nothing has to be looked up to know one.

    <namespace>/identity.json                                         what the namespace is, for people
    <namespace>/<first byte of the parent>/<parent>/<key>.<label>     a block, tail or checkpoint

Namespace, parent and key are in hex. The label says which rank the block has: daemons with other profiles store
their own objects beside it. The parent stands in the name so that one listing gives all that follows a block (a prompt
does not know how long the tails are that were stored), and so that a listing alone tells leaves from heads for
eviction. It is a folder, since clients of S3 list whole folders.

A namespace with a salt has keyed hashes in place of namespace, parent and key: HMAC-SHA256 under a key made from
its root, which follows from the salt. A listing does not tell whether the store holds a text that its reader
guesses. The objects hold tokens like any other: who may read the store can read prompts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import NamedTuple

from kvstore.core.blocks import FIDELITY_EXACT
from kvstore.core.keys import NamespaceInfo

_TAG = b"kvstore/remote/v1\0"
_FOLDER = b"namespace"
IDENTITY = "identity.json"
EXACT = "exact"
_NAME = re.compile(r"([0-9a-f]{64})/([0-9a-f]{2})/([0-9a-f]{64})/([0-9a-f]{64})\.(exact|b[0-9]{1,3})")
# The labels of what the shipped profiles store, the best first. Others are found only under a session's own label.
SHIPPED = (EXACT, "b8", "b6", "b4", "b3")


class ObjectName(NamedTuple):
    """The parts of an object's name, in hex as they stand in it. Of a block without a parent `parent` is the root's."""

    folder: str
    parent: str
    key: str
    label: str


class Naming:
    """How the objects of one namespace are named. Immutable; any thread."""

    __slots__ = ("_info", "_secret", "folder", "root")

    def __init__(self, info: NamespaceInfo | None, *, root: bytes = b"", is_salted: bool = False) -> None:
        """Where the layout is not known, `info` is None and the others say enough for all but `identity`."""
        self._info = info
        self.root = info.root if info is not None else root
        is_salted = info.is_salted if info is not None else is_salted
        self._secret = hmac.digest(self.root, _TAG, hashlib.sha256) if is_salted else b""
        self.folder = self.hexed(_FOLDER) if self._secret else self.root.hex()

    def hexed(self, key: bytes) -> str:
        """A key, or the root, as it stands in names."""
        return hmac.digest(self._secret, key, hashlib.sha256).hex() if self._secret else key.hex()

    def name(self, parent: bytes, key: bytes, label: str) -> str:
        """The object of a block. `parent`: its parent's key; the root for the first block of a sequence."""
        return f"{self.children(parent)}{self.hexed(key)}.{label}"

    def children(self, parent: bytes) -> str:
        """What the names of all blocks, tails and checkpoints after `parent` start with."""
        shown = self.hexed(parent)
        return f"{self.folder}/{shown[:2]}/{shown}/"

    @property
    def identity_name(self) -> str:
        """The object for people."""
        return f"{self.folder}/{IDENTITY}"

    def identity(self) -> bytes:
        """Its bytes: JSON. Of a namespace with a salt no root, from which names could be computed, and no alias."""
        assert self._info is not None
        shown = {"salted": True} if self._secret else {"alias": self._info.alias, **self._info.identity}
        return json.dumps(shown, indent=1).encode() + b"\n"


def parse_object_name(name: str) -> ObjectName | None:
    """The parts of a name; None for a name that no block has."""
    found = _NAME.fullmatch(name)
    if not found or found[2] != found[3][:2]:
        return None
    return ObjectName(found[1], found[3], found[4], found[5])


def label_of(fidelity: int) -> str:
    """The label of a block of this rank: `exact`, or `b` and whole bits a value."""
    return EXACT if fidelity >= FIDELITY_EXACT else f"b{min(max(fidelity, 0) // 100, 999)}"


def labels_from(fidelity_min: int, first: int | None = None) -> tuple[str, ...]:
    """Labels to look for, for a session that takes `fidelity_min` or more: that of rank `first`, then shipped ones.

    `first`: the rank of what the session itself stores; None: `fidelity_min`.
    """
    own = label_of(fidelity_min if first is None else first)
    least = fidelity_min // 100
    return tuple(dict.fromkeys([own, *(one for one in SHIPPED if one == EXACT or int(one[1:]) >= least)]))
