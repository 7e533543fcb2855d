"""Measures the quality loss of a profile on a model: continues a text after a cold and after a restored prefix.

For every window of text the model prefills a prefix once. A daemon stores the cache with the profile, the cache is
fetched again, and both caches are continued with the same tokens. So the result includes all losses that a user would
see: incomplete groups, tails, and the rounding of decoded values to the dtype.

    KL          of the next-token distributions, restored against cold, in nats: mean and 99th percentile of positions
    top-1       share of positions where the most likely token is the same
    NLL         how much less likely the text itself became, nats a token
    answers     loss on the answers of arithmetic of several steps that stands in the prefix (`arithmetic.py`), nats a
                token, after the cold and after the restored prefix
    bits        what is kept for each value of KV: codes, scales, norms, and what waits unquantized at the end; without
                the headers of blobs, which weigh by the token

Sequences of any length are quantized while measuring: a threshold would keep short prefixes unquantized, and the result
would be that of lossless KV. `kvstore.codecs.plausible` refuses such results by their bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from kvstore.client.results import Miss
from kvstore.client.session import Session
from kvstore.codecs.device import dtype_name, dtype_of
from kvstore.codecs.profiles import parse_profile
from kvstore.core.keys import Namespace
from kvstore.core.layers import PARTS, KVLayer, LayerSpec, Layout, StateLayer
from kvstore.errors import InvalidRequestError, KVStoreError
from kvstore.integrations.arithmetic import Encode, Problems, problems
from kvstore.integrations.caches import capture, restore
from kvstore.quality import KL_MAX, Quality

Layers = list[KVLayer | StateLayer]
LogProbs = npt.NDArray[np.float32]

NEXT_TOKENS = 48
PREFILL_STEP = 512
# A fetch may take as long as it needs: only its result is measured.
PATIENT_MS = 120_000


@dataclass(frozen=True, slots=True)
class Window:
    """A prefix of text with problems in its midst, what follows it in the text, and the problems."""

    prefix: tuple[int, ...]
    following: tuple[int, ...]
    problems: Problems


def windows(tokens: Sequence[int], count: int, shortest: int, longest: int, encode: Encode) -> list[Window]:
    """`count` windows spread over the text, prefixes of `shortest` to `longest` tokens, the same for every call.

    They overlap where the text is short. `encode`: text to tokens, without special ones. InvalidRequestError when the
    text does not hold one, or a prefix of `shortest` no problems.
    """
    found = []
    for number in range(count):
        asked = problems(number, encode)
        least = shortest - len(asked.statement)
        most = min(longest - len(asked.statement), len(tokens) - NEXT_TOKENS)
        if least < 0:
            raise InvalidRequestError(
                f"the problems in a prefix have {len(asked.statement)} tokens: give a --shortest of as many or more"
            )
        if most < least:
            raise InvalidRequestError(
                f"the text has {len(tokens)} tokens; {least + NEXT_TOKENS} are the least: give more --prompt-file"
            )
        # Lengths and places by two irrational steps: evenly spread, never in step with block or group boundaries.
        length = least + int((number * 0.6180339887) % 1 * (most - least + 1))
        room = len(tokens) - length - NEXT_TOKENS
        start = int((number * 0.7548776662) % 1 * (room + 1))
        text = tuple(tokens[start : start + length + NEXT_TOKENS])
        at = int((number * 0.5698402910) % 1 * (length // 2 + 1))
        found.append(Window((*text[:at], *asked.statement, *text[at:length]), text[length:], asked))
    return found


@dataclass
class Tally:
    """Sums over windows. `values`: numbers of KV values stored, `stored_bytes` what they took.

    `speeds`: of each window, bytes of raw KV a second, stored and decoded.
    """

    tokens: int = 0
    kl: list[float] = field(default_factory=list)
    same: int = 0
    nll_delta: float = 0.0
    answers: int = 0
    answer_cold: float = 0.0
    answer_restored: float = 0.0
    answer_wrong: float = 0.0
    answer_loss: float = 0.0
    values: int = 0
    stored_bytes: int = 0
    speeds: list[tuple[float, float]] = field(default_factory=list)

    def compare(self, cold: LogProbs, restored: LogProbs, text: Sequence[int]) -> None:
        """Add the positions of one continuation: `[tokens, vocabulary]` each, `text` what really came next."""
        chance = np.exp(cold)
        # A token that cannot come adds nothing, whatever the restored cache makes of it.
        terms = np.where(chance > 0, chance * (cold - restored), 0.0)
        kl = np.nan_to_num(terms.sum(axis=-1), nan=KL_MAX, posinf=KL_MAX).clip(0, KL_MAX)
        self.kl += kl.tolist()
        known = np.isfinite(restored).any(axis=-1) & ~np.isnan(restored).any(axis=-1)
        self.same += int(((cold.argmax(-1) == restored.argmax(-1)) & known).sum())
        scored = range(1, len(text))
        self.nll_delta += float((_losses(restored, text, scored) - _losses(cold, text, scored)).sum())

    def ask(self, cold: LogProbs, wrong: LogProbs, restored: LogProbs, asked: Problems) -> None:
        """Add one window's answers: after the cold prefix the right and the wrong ones, after the restored the right.

        Right and wrong answers may differ in tokens: the loss on the wrong ones counts as if they were as many.
        """
        right, other = asked.right, asked.wrong
        self.answers += len(right.scored)
        before, after = (_losses(logprobs, right.tokens, right.scored) for logprobs in (cold, restored))
        self.answer_cold += float(before.sum())
        self.answer_restored += float(after.sum())
        # A guess that happens to become likelier must not outweigh an answer that was lost.
        self.answer_loss += float((after - before).clip(0).sum())
        self.answer_wrong += float(_losses(wrong, other.tokens, other.scored).mean()) * len(right.scored)

    def quality(self, profile: str, spec: str, prefixes: int) -> Quality:
        """What was measured so far, over all positions; `spec` and `prefixes` are noted as they are."""
        positions = len(self.kl)
        # Kernels are compiled and memory is touched in the first window, so it says nothing about the speed.
        encode, decode = np.median(self.speeds[1:] or self.speeds, axis=0)
        return Quality(
            profile=profile,
            spec=spec,
            prefixes=prefixes,
            tokens=self.tokens,
            threshold_tokens=0,
            positions=positions,
            kl_mean=float(np.mean(self.kl)),
            kl_p99=float(np.percentile(self.kl, 99)),
            top1=self.same / positions,
            nll_delta=self.nll_delta / positions,
            answers=self.answers,
            answer_cold=self.answer_cold / self.answers,
            answer_restored=self.answer_restored / self.answers,
            answer_wrong=self.answer_wrong / self.answers,
            answer_loss=self.answer_loss / self.answers,
            bits_per_value=8 * self.stored_bytes / self.values,
            encode_bytes_per_s=float(encode),
            decode_bytes_per_s=float(decode),
            created_s=int(time.time()),
        )


def _losses(logprobs: LogProbs, tokens: Sequence[int], scored: Sequence[int]) -> npt.NDArray[np.float64]:
    """Nats that each `tokens[i]` of `scored` costs after `logprobs[i - 1]`; what is not finite costs KL_MAX."""
    rows = np.array(scored)
    chosen = -logprobs[rows - 1, np.array(tokens)[rows]].astype(np.float64)
    losses: npt.NDArray[np.float64] = np.nan_to_num(chosen, nan=KL_MAX, posinf=KL_MAX).clip(max=KL_MAX)
    return losses


class Calibration:
    """A model and windows of text; `measure` runs one profile over them. Use it on the thread that owns the model.

    `kv_dtype`: the dtype of KV, also in the cold cache; the model still computes in its own dtype. A float32 model with
    bfloat16 KV shows the error of the codec without the rounding of the computation. None: the model's dtype.
    """

    def __init__(self, model: Any, of: Sequence[Window], tree: str = "", kv_dtype: str | None = None) -> None:
        self._model = model
        self.windows = of
        self._tree = tree
        self._kv_dtype = dtype_of(kv_dtype) if kv_dtype else None

    def namespace(self) -> Namespace:
        """A namespace for measuring only, of the layout under which this calibration stores."""
        layers = self.prefill(self.windows[0].prefix[:2])
        layout = Layout(tuple(layer.spec for layer in layers), self._tree)
        return Namespace(weights=b"calibration", layout=layout)

    def measure(self, sessions: Mapping[str, Session], tell: Callable[[int], None] = lambda _: None) -> list[Quality]:
        """Run all windows through every session, by profile. `tell` hears the number of each window that is done.

        No two sessions may share a namespace, and their daemon must have no threshold below which nothing is
        quantized. KVStoreError when a prefix does not come back whole, or the cold model gives no probabilities: the
        answer would say nothing.
        """
        tallies = {profile: Tally() for profile in sessions}
        for number, window in enumerate(self.windows):
            cold = self.prefill(window.prefix)
            asked = window.problems
            text, right, wrong = (
                self.continued(cold, tokens) for tokens in (window.following, asked.right.tokens, asked.wrong.tokens)
            )
            if any(np.isnan(logprobs).any() for logprobs in (text, right, wrong)):
                raise KVStoreError("the model gives no probabilities (NaN) after a prefix that was not stored")
            for profile, session in sessions.items():
                tally = tallies[profile]
                warm = self._through(session, window, cold, tally)
                tally.compare(text, self.continued(warm, window.following), window.following)
                tally.ask(right, wrong, self.continued(warm, asked.right.tokens), asked)
            tell(number)
        specs = {profile: parse_profile(profile).spec for profile in sessions}
        return [tally.quality(profile, specs[profile], len(self.windows)) for profile, tally in tallies.items()]

    def prefill(self, prefix: Sequence[int]) -> Layers:
        """The cache after a cold prefill, without slack, in the dtype that is stored."""
        cache = make_prompt_cache(self._model)
        for at in range(0, len(prefix), PREFILL_STEP):
            mx.eval(self._model(mx.array([prefix[at : at + PREFILL_STEP]]), cache=cache))
        return [_cut(layer, self._kv_dtype) for layer in capture(cache)]

    def _through(self, session: Session, window: Window, layers: Layers, tally: Tally) -> Layers:
        """The layers as the store gives them back."""
        started = time.perf_counter()
        stored = session.store(window.prefix, layers, wait=True, restored_tokens=0)
        store_s = time.perf_counter() - started
        hit = session.fetch([*window.prefix, window.following[0]])
        if isinstance(hit, Miss) or hit.n_tokens != len(window.prefix):
            raise KVStoreError(
                f"a prefix of {len(window.prefix)} tokens came back with {hit.n_tokens}: store {stored.reason}, "
                f"fetch {hit.reason}"
            )
        arrays = [array for layer in hit.layers for array in _arrays(layer)]
        started = time.perf_counter()
        mx.eval(arrays)
        decode_s = time.perf_counter() - started
        tally.tokens += hit.n_tokens
        tally.stored_bytes += hit.source.nbytes - sum(array.nbytes for layer in layers for array in _states(layer))
        kv = [layer for layer in layers if isinstance(layer, KVLayer)]
        tally.values += sum(array.size for layer in kv for array in _arrays(layer))
        raw_bytes = sum(array.nbytes for layer in kv for array in _arrays(layer))
        tally.speeds.append((raw_bytes / store_s, raw_bytes / decode_s))
        return list(hit.layers)

    def continued(self, layers: Layers, tokens: Sequence[int]) -> LogProbs:
        """Log-probabilities after each of `tokens`, fed at once after a prefix whose layers stay as they are."""
        cache = restore([_computed(layer, self._compute_dtype) for layer in layers], self._tree)
        logits = self._model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return np.array(logits)

    @property
    def _compute_dtype(self) -> mx.Dtype | None:
        return mx.float32 if self._kv_dtype is not None else None


def _arrays(layer: KVLayer | StateLayer) -> Iterator[mx.array]:
    if isinstance(layer, KVLayer):
        for part in PARTS:
            yield from layer.part(part)
    else:
        yield from (array for _, array in layer.arrays)


def _states(layer: KVLayer | StateLayer) -> Iterator[mx.array]:
    """Arrays that are kept as they are, in a checkpoint."""
    return iter(()) if isinstance(layer, KVLayer) else _arrays(layer)


def _cut(layer: KVLayer | StateLayer, dtype: mx.Dtype | None) -> KVLayer | StateLayer:
    """The layer without slack, in the dtype that is stored."""
    if not isinstance(layer, KVLayer):
        return layer
    # An engine that quantizes its KV itself keeps it as it is.
    dtype = None if layer.spec.keys.bits else dtype
    keys, values = (tuple(_as(array[:, :, : layer.n_tokens], dtype) for array in layer.part(part)) for part in PARTS)
    mx.eval(*keys, *values)
    spec = layer.spec if dtype is None else _spec_in(layer.spec, dtype)
    return replace(layer, spec=spec, keys=keys, values=values)


def _computed(layer: KVLayer | StateLayer, dtype: mx.Dtype | None) -> KVLayer | StateLayer:
    """The layer in arrays of its own, in the dtype of the computation: appending leaves the original as it is."""
    if not isinstance(layer, KVLayer):
        return replace(layer, arrays=tuple((name, array[:]) for name, array in layer.arrays))
    dtype = None if layer.spec.keys.bits else dtype
    keys, values = (tuple(_as(array[:], dtype) for array in layer.part(part)) for part in PARTS)
    spec = layer.spec if dtype is None else _spec_in(layer.spec, dtype)
    return replace(layer, spec=spec, keys=keys, values=values)


def _as(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return array if dtype is None else array.astype(dtype)


def _spec_in(spec: LayerSpec, dtype: mx.Dtype) -> LayerSpec:
    """The spec with parts in another dtype; parts that the engine quantizes itself stay."""
    name = dtype_name(mx.zeros((), dtype))
    keys, values = (part if part.bits else replace(part, dtype=name) for part in (spec.keys, spec.values))
    return replace(spec, keys=keys, values=values)
