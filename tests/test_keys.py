"""Keys: golden vectors, and what must and must not change a key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, common_tokens, pack_tokens, unpack_tokens
from kvstore.core.keys import Chain, Namespace, NamespaceInfo, block_key, checkpoint_key, root_key
from kvstore.core.layers import LayerSpec, Layout, PartSpec
from kvstore.errors import CorruptDataError, InvalidRequestError

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
PART = PartSpec(2, 64, "BF16")
LAYOUT = Layout((LayerSpec(PART, PART),) * 3)
NAMESPACE = Namespace(weights=b"w" * 32, layout=LAYOUT, dtype="BF16", engine="mlx-lm 0.32")

token_ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=600)


def test_keys_equal_the_golden_vectors() -> None:
    """Keys on disk outlive every release: these bytes may never change under the same tags."""
    golden = json.loads(GOLDEN.read_text())
    tokens = pack_tokens(golden["tokens"])
    assert LAYOUT.digest.hex() == golden["layout_digest"]
    assert NAMESPACE.root.hex() == golden["root"]
    keys = Chain(NAMESPACE.root, tokens).keys()
    assert [key.hex() for key in keys] == golden["chain"]
    tail = tokens[len(keys) * BLOCK_TOKENS * TOKEN_BYTES :]
    assert block_key(keys[-1], tail).hex() == golden["tail"]
    assert checkpoint_key(keys[-1], tail).hex() == golden["checkpoint"]


def test_a_block_key_is_the_documented_hash() -> None:
    """The formula in the module's docstring, computed by hand."""
    parent, tokens = b"p" * 32, pack_tokens([1, -2, 2**63 - 1])
    expected = hashlib.sha256(b"kvstore/block/v1\0" + parent + tokens).digest()
    assert block_key(parent, tokens) == expected


@pytest.mark.parametrize("field", ["weights", "adapter", "salt", "engine", "dtype"])
def test_every_identity_field_changes_the_root(field: str) -> None:
    """No field of the identity is decoration."""
    changed = {"weights": b"x", "adapter": b"a", "salt": b"s", "engine": "vllm-mlx 0.6", "dtype": "F16"}[field]
    assert replace(NAMESPACE, **{field: changed}).root != NAMESPACE.root


def test_the_layout_changes_the_root_and_the_alias_does_not() -> None:
    """Display names never separate or join stores; geometry always does."""
    other = Layout((LayerSpec(PART, PART),) * 4)
    assert replace(NAMESPACE, layout=other).root != NAMESPACE.root
    assert replace(NAMESPACE, alias="some model").root == NAMESPACE.root


@given(st.lists(st.binary(max_size=8), min_size=6, max_size=6), st.lists(st.binary(max_size=8), min_size=6, max_size=6))
def test_bytes_cannot_move_from_one_field_to_the_next(a: list[bytes], b: list[bytes]) -> None:
    """Length prefixes keep ("ab", "c") and ("a", "bc") apart."""
    roots = [root_key(*f[:3], f[3].hex(), f[4].hex(), f[5]) for f in (a, b)]
    assert (roots[0] == roots[1]) == (a == b)


@given(token_ids)
def test_tokens_survive_packing(ids: list[int]) -> None:
    """Any signed 64-bit id, vision placeholders included, in whatever sequence."""
    packed = pack_tokens(ids)
    assert unpack_tokens(packed) == ids
    assert pack_tokens(tuple(ids)) == pack_tokens(iter(ids)) == pack_tokens(np.array(ids, np.int64)) == packed
    assert pack_tokens(np.array([])) == b""


@given(token_ids, token_ids, st.integers(0, 600))
def test_common_tokens_is_the_longest_common_prefix(a: list[int], b: list[int], cut: int) -> None:
    """Against the obvious loop, with a prefix shared on purpose."""
    b = a[:cut] + b
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_tokens(pack_tokens(a), pack_tokens(b)) == expected


ARRAYS = [np.array([1.5]), np.array([[1]]), np.array(1), np.array([2**63], np.uint64), np.array([True, False])]


@pytest.mark.parametrize("bad", [[2**63], [-(2**63) - 1], [1.5], ["a"], [[1]], b"1234567", [None], None, *ARRAYS])
def test_what_is_not_a_token_is_refused(bad: object) -> None:
    """A typed error, not a wrong key."""
    with pytest.raises(InvalidRequestError):
        pack_tokens(bad)  # type: ignore[arg-type]


def test_a_namespace_record_keeps_everything_but_the_salt() -> None:
    """Data at rest must not give the salt away."""
    salted = replace(NAMESPACE, salt=b"very secret salt", alias="m")
    record = salted.to_record()
    assert b"very secret salt" not in record
    assert NamespaceInfo.from_record(record) == salted.info


@given(st.binary(max_size=200))
def test_a_record_that_is_none_is_corrupt_not_a_crash(junk: bytes) -> None:
    """Arbitrary bytes end in the one typed error."""
    with pytest.raises(CorruptDataError):
        NamespaceInfo.from_record(junk)


@given(st.lists(st.integers(0, 3), min_size=0, max_size=1100), st.lists(st.integers(0, 4), max_size=6), st.data())
def test_a_chain_gives_the_keys_of_its_blocks_in_whatever_order_they_are_asked_for(
    ids: list[int], asked: list[int], data: st.DataObject
) -> None:
    """As hashing block after block does, for the prompt and for each of its heads."""
    tokens = pack_tokens(ids)
    keys, parent = [], NAMESPACE.root
    for at in range(0, len(tokens), BLOCK_TOKENS * TOKEN_BYTES):
        parent = block_key(parent, tokens[at : at + BLOCK_TOKENS * TOKEN_BYTES])
        keys.append(parent)
    chain = Chain(NAMESPACE.root, tokens)
    full = len(ids) // BLOCK_TOKENS
    for index in asked:
        if index < full:
            assert chain.key(index) == keys[index]
    count, held = data.draw(st.integers(0, full)), data.draw(st.integers(0, full))
    step = BLOCK_TOKENS * TOKEN_BYTES
    values = {keys[at]: b"head" + tokens[at * step : (at + 1) * step] + b"end" for at in range(held)}
    found = [(keys[at], values[keys[at]], BLOCK_TOKENS) for at in range(min(count, held))]
    assert chain.stored(count, values.get, 4) == found
    n_tokens = data.draw(st.integers(0, len(ids)))
    head = chain.head(n_tokens)
    assert head.tokens == tokens[: n_tokens * TOKEN_BYTES]
    assert head.keys() == keys[: n_tokens // BLOCK_TOKENS]
    assert chain.keys() == keys[:full] and chain.block_keys() == keys
    assert chain.checkpoint_key() == checkpoint_key(([NAMESPACE.root, *keys])[full], chain.tail)


def test_a_stored_value_with_other_tokens_ends_what_a_chain_finds() -> None:
    """A key alone never decides. What comes after it is not looked up."""
    chain, asked = Chain(NAMESPACE.root, pack_tokens(range(3 * BLOCK_TOKENS))), []
    blocks = [pack_tokens(range(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS)) for at in range(3)]
    values = dict(zip(chain.keys(), (blocks[0], blocks[1][:-1] + b"x", blocks[2]), strict=True))

    def look_up(key: bytes) -> bytes | None:
        asked.append(key)
        return values.get(key)

    assert chain.stored(3, look_up, 0) == [(chain.key(0), blocks[0], BLOCK_TOKENS)]
    assert asked == chain.keys()[:2]


def test_a_block_of_a_chain_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for, the tail too, also by heads that were cut when its key was known."""
    hashed: list[bytes] = []

    def counted(parent: bytes, tokens: bytes) -> bytes:
        hashed.append(tokens)
        return block_key(parent, tokens)

    monkeypatch.setattr("kvstore.core.keys.block_key", counted)
    chain = Chain(NAMESPACE.root, pack_tokens(range(4 * BLOCK_TOKENS + 1)))
    chain.key(1)
    for _ in range(2):
        chain.keys()
        chain.block_keys()
        chain.head(3 * BLOCK_TOKENS).keys()
        chain.parent(4)
    assert len(hashed) == 5
