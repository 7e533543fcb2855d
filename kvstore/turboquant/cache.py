"""The quantized cache of one head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import mlx.core as mx

from kvstore.codecs.turboquant import encode_rows, turboquant_mse_recipe, turboquant_prod_recipe
from kvstore.core.blocks import Recipe
from kvstore.errors import InvalidVectorError
from kvstore.turboquant.quantizers import (
    PackedVectors,
    Quantizer,
    QuantStrategy,
    as_array,
    checked_vectors,
    inner_products,
    weighted_sum,
)

VALUE_SEED = 2
HEAD_SEED = 1000
_PENDING_MAX = 256

Tensors = tuple[mx.array, ...]


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """Configuration of the quantized cache of one head: `dim` coordinates per key and per value.

    Values are always packed with MSE; `key_strategy` applies to keys only. `max_tokens`: when the cache is full, the
    oldest tokens are dropped; 0 means no limit. `store_norms`: accept vectors of any length, at 4 bytes more per
    vector. Without it, vectors must be unit vectors.
    """

    dim: int
    key_bits: int = 4
    value_bits: int = 4
    key_strategy: QuantStrategy = QuantStrategy.PROD
    seed: int = 42
    max_tokens: int = 0
    store_norms: bool = False

    @property
    def key_recipe(self) -> Recipe:
        """How keys are packed."""
        make = turboquant_prod_recipe if self.key_strategy is QuantStrategy.PROD else turboquant_mse_recipe
        return make(self.key_bits, self.seed, unit=not self.store_norms)

    @property
    def value_recipe(self) -> Recipe:
        """How values are packed."""
        return turboquant_mse_recipe(self.value_bits, self.seed + VALUE_SEED, unit=not self.store_norms)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serializable dictionary. `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KVCacheConfig:
        """Build a configuration from a dictionary. Missing fields get their defaults.

        Raises InvalidVectorError (config) for unknown fields, wrong types and values out of range.
        """
        try:
            given = cls(**values)
            strategy = QuantStrategy(given.key_strategy)
        except (TypeError, ValueError) as error:
            raise InvalidVectorError("config", f"not a cache configuration: {error}") from error
        for one in fields(cls):
            value = getattr(given, one.name)
            wanted = {"int": int, "bool": bool}.get(str(one.type))
            if wanted is not None and type(value) is not wanted:
                raise InvalidVectorError("config", f"{one.name} is {value!r}, expected {one.type}")
        return replace(given, key_strategy=strategy)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Sizes of a cache of one head: packed bytes, and bytes in float32.

    `key_bits` and `value_bits` as configured; `key_bits_packed` and `value_bits_packed` are the bits that a coordinate
    takes with everything: scales, and the zeros that rows are filled up with.
    """

    dim: int
    num_tokens: int
    key_strategy: QuantStrategy
    key_bits: int
    value_bits: int
    key_bits_packed: float
    value_bits_packed: float
    key_bytes: int
    value_bytes: int
    baseline_bytes: int

    @property
    def total_bytes(self) -> int:
        """Packed bytes of keys and values together."""
        return self.key_bytes + self.value_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes in float32 divided by bytes as packed; 0 for an empty cache."""
        return self.baseline_bytes / self.total_bytes if self.total_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the derived ones too, as json takes them."""
        return {**asdict(self), "total_bytes": self.total_bytes, "compression_ratio": self.compression_ratio}


class PackedRows:
    """Packed vectors in order, the newest last, in tensors that grow. One thread at a time.

    Appended tensors wait in a list and are joined when somebody reads: a push for each token copies nothing.
    """

    def __init__(self, quantizer: Quantizer, max_rows: int) -> None:
        self.quantizer = quantizer
        self._max_rows = max_rows
        self.clear()

    def clear(self) -> None:
        """Drop all rows: `n_rows` is 0, and the tensors have no rows."""
        nothing = mx.zeros((0, self.quantizer.form.width), self.quantizer.dtype)
        self._waiting = [encode_rows(nothing, self.quantizer.form)]
        self.n_rows = 0

    def extend(self, tensors: Tensors) -> None:
        """Append evaluated tensors `[n, ...]`; the oldest rows beyond the limit leave."""
        self._waiting.append(tensors)
        self.n_rows += tensors[0].shape[0]
        if self._max_rows and self.n_rows > self._max_rows:
            self.n_rows = self._max_rows
        if len(self._waiting) > _PENDING_MAX:
            self.tensors()

    @property
    def bits(self) -> float:
        """Bits a coordinate as packed, with everything."""
        return sum(8.0 * tensor.shape[-1] * tensor.itemsize for tensor in self._waiting[0]) / self.quantizer.dim

    @property
    def packed(self) -> PackedVectors:
        """All rows with what packed them."""
        return PackedVectors(self.quantizer.recipe, self.tensors(), self.quantizer.dim)

    def tensors(self) -> Tensors:
        """All rows `[n_rows, ...]`, evaluated."""
        if len(self._waiting) > 1:
            joined = tuple(mx.concatenate(list(same)) for same in zip(*self._waiting, strict=True))
            drop = joined[0].shape[0] - self.n_rows
            self._waiting = [tuple(mx.contiguous(tensor[drop:]) for tensor in joined) if drop else joined]
            mx.eval(*self._waiting[0])
        return self._waiting[0]


class QuantizedKVCache:
    """Packed keys and values of one head, and attention over them. One thread at a time.

    What is appended must be unit vectors unless `config.store_norms`. An append happens whole or not at all. Appending
    tokens one by one gives, bit for bit, what appending them together gives.
    """

    def __init__(self, config: KVCacheConfig, quantizers: tuple[Quantizer, Quantizer] | None = None) -> None:
        """`quantizers`: of keys and values, if not those that `config` names.

        InvalidVectorError (dimension, bits, seed, length) for what cannot be.
        """
        if config.max_tokens < 0:
            raise InvalidVectorError("length", f"a window of {config.max_tokens} tokens")
        keys, values = quantizers or (
            Quantizer(config.key_recipe, config.dim),
            Quantizer(config.value_recipe, config.dim),
        )
        self.config = config
        self._keys = PackedRows(keys, config.max_tokens)
        self._values = PackedRows(values, config.max_tokens)

    @classmethod
    def from_packed(
        cls, keys: PackedVectors, values: PackedVectors, dims: tuple[int, int], max_tokens: int = 0
    ) -> QuantizedKVCache:
        """A cache over packed keys and values `[n]` of `dims` coordinates, whatever their recipes; they are not copied.

        Further vectors are packed in the same way. InvalidVectorError (length) unless there are as many of both.
        """
        quantizers = (_quantizer(keys, dims[0]), _quantizer(values, dims[1]))
        form = quantizers[0].form
        config = KVCacheConfig(
            dims[0],
            keys.recipe.param("bits"),
            values.recipe.param("bits"),
            QuantStrategy.PROD if form.prod else QuantStrategy.MSE,
            form.seed,
            max_tokens,
            not form.unit,
        )
        cache = cls(config, quantizers)
        cache.commit((keys.tensors, values.tensors))
        return cache

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._keys.n_rows

    def append(self, keys: Any, values: Any) -> None:
        """Keys `[n, dim]` and values `[n, dim]`, n may be 0. InvalidVectorError, and nothing changed, otherwise."""
        self.commit(self.prepare(keys, values))

    def push_token(self, key: Any, value: Any) -> None:
        """One key `[dim]` and one value `[dim]`."""
        one = [_one(vector) for vector in (key, value)]
        self.append(*one)

    def prepare(self, keys: Any, values: Any) -> tuple[Tensors, Tensors]:
        """Validate and pack keys and values without appending them. Pass the result to `commit`.

        Raises InvalidVectorError for vectors that cannot be packed.
        """
        rows = [_rows(part, each.quantizer) for part, each in ((keys, self._keys), (values, self._values))]
        if rows[0].shape[0] != rows[1].shape[0]:
            raise InvalidVectorError("length", f"{rows[0].shape[0]} keys and {rows[1].shape[0]} values")
        keys, values = (
            each.quantizer.quantize(part) for part, each in zip(rows, (self._keys, self._values), strict=True)
        )
        return keys.tensors, values.tensors

    def commit(self, packed: tuple[Tensors, Tensors]) -> None:
        """Append what `prepare` made."""
        keys, values = packed
        if keys[0].shape[0] != values[0].shape[0]:
            raise InvalidVectorError("length", f"{keys[0].shape[0]} keys and {values[0].shape[0]} values")
        self._keys.extend(keys)
        self._values.extend(values)

    def attention_scores(self, query: Any) -> mx.array:
        """float32 `[num_tokens]`: inner products of `query` `[dim]` with the keys, on their codes."""
        quantizer = self._keys.quantizer
        return inner_products(self._keys.tensors(), quantizer.form, quantizer.padded(_query(query, quantizer.dim)))

    def attention_output(self, query: Any, temperature: float = 0.0) -> mx.array:
        """float32 `[dim]`: values weighted by softmax(temperature * scores); zero when the cache is empty.

        A temperature of 0 or less stands for 1 / sqrt(dim). InvalidVectorError (temperature) for what is no finite
        number of float32.
        """
        factor = checked_temperature(temperature) or 1.0 / math.sqrt(self.config.dim)
        quantizer = self._values.quantizer
        scores = self.attention_scores(query)
        if not self.num_tokens:
            return mx.zeros((quantizer.dim,))
        # The largest score is taken off first: its product with a large temperature would be infinite.
        weights = mx.softmax((scores - mx.max(scores)) * factor)
        return quantizer.cut(weighted_sum(self._values.tensors(), quantizer.form, weights))

    def reconstruct_keys(self) -> mx.array:
        """float32 `[num_tokens, dim]`, decoded."""
        return self._keys.quantizer.dequantize(self.packed_keys)

    def reconstruct_values(self) -> mx.array:
        """float32 `[num_tokens, dim]`, decoded."""
        return self._values.quantizer.dequantize(self.packed_values)

    @property
    def packed_keys(self) -> PackedVectors:
        """All keys in packed form, without decoding."""
        return self._keys.packed

    @property
    def packed_values(self) -> PackedVectors:
        """The values as they are kept."""
        return self._values.packed

    def stats(self) -> CacheStats:
        """Dimension, bits, tokens and bytes."""
        keys, values, config = self._keys, self._values, self.config
        return CacheStats(
            dim=config.dim,
            num_tokens=self.num_tokens,
            key_strategy=config.key_strategy,
            key_bits=config.key_bits,
            value_bits=config.value_bits,
            key_bits_packed=keys.bits,
            value_bits_packed=values.bits,
            key_bytes=self.packed_keys.nbytes,
            value_bytes=self.packed_values.nbytes,
            baseline_bytes=self.num_tokens * (keys.quantizer.dim + values.quantizer.dim) * 4,
        )

    def __repr__(self) -> str:
        config = self.config
        bits = f"key_bits={config.key_bits}, value_bits={config.value_bits}, key_strategy={str(config.key_strategy)!r}"
        return f"QuantizedKVCache(dim={config.dim}, num_tokens={self.num_tokens}, {bits})"

    def clear(self) -> None:
        """Drop all tokens."""
        self._keys.clear()
        self._values.clear()


def _quantizer(packed: PackedVectors, dim: int) -> Quantizer:
    """The quantizer for further vectors."""
    return Quantizer(packed.recipe, dim, packed.tensors[1].dtype if len(packed.tensors) > 1 else mx.float32)


def _one(vector: Any) -> mx.array:
    array = as_array(vector)
    if array.ndim != 1:
        raise InvalidVectorError("dimension", f"one vector is expected, got {tuple(array.shape)}")
    return array[None]


def _rows(vectors: Any, quantizer: Quantizer) -> mx.array:
    """`[n, dim]`; an empty list is no rows."""
    array = as_array(vectors)
    if array.size == 0:
        return mx.zeros((0, quantizer.dim))
    if array.ndim != 2 or array.shape[1] != quantizer.dim:
        raise InvalidVectorError("dimension", f"vectors {tuple(array.shape)}, expected [n, {quantizer.dim}]")
    return array


def _query(query: Any, width: int) -> mx.array:
    """float32 `[width]` of any length; InvalidVectorError (dimension, non_finite) otherwise."""
    rows = checked_vectors(query, width, unit=False)
    if rows.ndim != 1:
        raise InvalidVectorError("dimension", f"one query of {width} numbers, got {tuple(rows.shape)}")
    return rows


def checked_temperature(temperature: float) -> float:
    """The factor of scores, 0 where it is left to the cache; InvalidVectorError (temperature) for no finite number."""
    try:
        factor = float(temperature)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidVectorError("temperature", f"not a number: {temperature!r}") from error
    if not abs(factor) <= mx.finfo(mx.float32).max:
        raise InvalidVectorError("temperature", f"a temperature is a finite number of float32, got {temperature!r}")
    return max(factor, 0.0)
