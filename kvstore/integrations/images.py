"""Prompts with images: positions at which such a prompt may be cut."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.client.session import Session


def before_image(tokens: Sequence[int], n_tokens: int) -> int:
    """`n_tokens`, or the start of the image that a cut there would split.

    mlx_lm.server names each patch of an image by one negative id; it can feed an image only whole.
    """
    if tokens[n_tokens] < 0:
        while n_tokens > 0 and tokens[n_tokens - 1] == tokens[n_tokens]:
            n_tokens -= 1
    return n_tokens


def splits_image(tokens: Sequence[int], n_tokens: int) -> bool:
    """Whether a cut after `n_tokens` would split an image."""
    return before_image(tokens, n_tokens) < n_tokens


def around_images(session: Session, tokens: Sequence[int]) -> Sequence[int]:
    """Shorten `tokens` so that the longest prefix in the store does not end inside an image.

    A hit cannot be cut where layers are valid at one position only; the next lower position is up to the store.
    """
    if min(tokens) < 0:
        while (found := session.match(tokens).n_tokens) > (usable := before_image(tokens, found)):
            tokens = tokens[: usable + 1]
    return tokens
