"""Sanitizes text from outside for a terminal, a log or a table."""

from __future__ import annotations

import unicodedata

# Names that people see: longer ones are cut, or refused where they are part of the identity.
NAME_CHARACTERS_MAX = 200


def plain_text(text: str, characters_max: int = 0) -> str:
    """Text that a terminal only shows: what moves its cursor, colours or reorders becomes an escape, such as \\x1b.

    Unicode's control, format, surrogate, private and unassigned characters, and its line and paragraph separators.
    Longer text than `characters_max` is cut; 0: none is.
    """
    if not text.isprintable():
        text = "".join(one if _is_plain(one) else ascii(one)[1:-1] for one in text)
    return text if not characters_max or len(text) <= characters_max else text[: characters_max - 1] + "…"


def _is_plain(character: str) -> bool:
    return not (unicodedata.category(character).startswith("C") or character in "\u2028\u2029")


def size_text(nbytes: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def both_sizes_text(nbytes: int) -> str:
    """Bytes for people, with the exact number if it says more: "4.0 MB (4000001 bytes)"."""
    return size_text(nbytes) + (f" ({nbytes} bytes)" if nbytes >= 1000 else "")


def counted(count: int, noun: str) -> str:
    """A number and what it counts: "1 block", "2,000 blocks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span_text(seconds: int) -> str:
    """A length of time for people, in its largest unit that fits."""
    for unit, length_s in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds // length_s} {unit}"
    return f"{max(seconds, 0)} s"


def took_text(seconds: float) -> str:
    """Duration of a request: milliseconds up to ten seconds, then seconds."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
