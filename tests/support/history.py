"""What a store has done for months, made up: a Stats reply and a history as the client answers them."""

from __future__ import annotations

import math
import random
from typing import Any

HOUR_S = 3600
# A Sunday evening, by whatever clock.
NOW_S = 1_795_975_200
# Name, share of the traffic, and how much of its prompt tokens are hits, beside the others.
MODELS = (("qwen3-coder-30b-4bit", 0.62, 1.05), ("gpt-oss-20b", 0.27, 0.97), ("gemma-3-12b-it-8bit", 0.11, 0.79))


def made_history(days: int, now_s: int = NOW_S, seed: int = 7) -> list[dict[str, Any]]:
    """Hours of people who work by day, take weekends off, and whose store fills up to 100 GB."""
    rng, used, hours = random.Random(seed), 2e9, []
    for back in range(24 * days, -1, -1):
        hour_s = now_s // HOUR_S * HOUR_S - back * HOUR_S
        by_day = math.sin(math.pi * min(1.0, max(0.0, (hour_s // HOUR_S % 24 - 7) / 12)))
        busy = by_day * (0.15 if hour_s // (24 * HOUR_S) % 7 in (2, 3) else 1.0) * rng.uniform(0.5, 1.2)
        if busy < 0.1:
            continue
        requests = int(60 * busy)
        asked = int(requests * rng.uniform(9_000, 16_000))
        hit = int(asked * min(0.97, rng.uniform(0.7, 0.95) * min(1.0, 0.4 + (24 * days - back) / 240)))
        written = int((asked - hit) * 42_000)
        used, evicted = used + written * 0.8, 0.0
        if used > 1e11:
            used, evicted = 9.97e10, used - 9.97e10
        misses = int(requests * (1 - hit / asked))
        hours.append(
            {
                "hour_s": hour_s,
                "traffic": {
                    "hits": requests - misses - 1,
                    "shortened": 1,
                    "misses": misses,
                    "in_memory": requests // 3,
                    "prompt_tokens": asked,
                    "hit_tokens": hit,
                    "saved_s": hit / 410,
                    "stores": requests // 2,
                    "stored_tokens": asked - hit,
                    "written_bytes": written,
                    "reused_bytes": int(hit * 9_000),
                },
                "miss_reasons": {"unknown_prefix": misses, "below_threshold": misses // 9, "identity": misses // 30},
                "shortened_reasons": {"slower_than_prefill": 1},
                "store_reasons": {"already_stored": requests // 4, "queue_full": requests // 40},
                "evicted_bytes": int(evicted),
                "used_bytes": int(used),
            }
        )
    return hours


def made_stats(hours: list[dict[str, Any]], now_s: int = NOW_S, **daemon: Any) -> dict[str, Any]:
    """A reply that fits to the history."""
    names = ("hits", "shortened", "misses", "prompt_tokens", "hit_tokens", "saved_s", "written_bytes", "reused_bytes")
    total = {name: sum(hour["traffic"][name] for hour in hours) for name in names}
    used = hours[-1]["used_bytes"] if hours else 4096
    shares = MODELS if hours else ()
    return {
        "schema": 1,
        "daemon": {
            "version": "0.1.0", "pid": 4711, "uptime_s": 3 * 86_400 if hours else 20, "state": "serving", "detail": "",
            "device": "gpu", "profile": "safe", **daemon,
        },
        "disk": {
            "used_bytes": used, "budget_bytes": 10**11, "free_bytes": 412 * 10**9, "free_floor_bytes": 20 * 10**9,
            "blobs": used // 10**7, "quarantined": 0,
        },
        "bytes": {"logical": 0, "stored": used, "written": total["written_bytes"], "served": 0},
        "lifetime": total,
        "lifetime_since_s": hours[0]["hour_s"] if hours else now_s - 20,
        "since_start": total,
        "last_hour": hours[-1]["traffic"] if hours else {},
        "miss_reasons": {},
        "namespaces": [
            {
                "id": f"{number:02x}3f9a1c77d0" + "0" * 52,
                "alias": alias,
                "tokens": int(used * share / 42_000),
                "bytes": int(used * share),
                "blocks": int(used * share / 10**7),
                "logical_bytes": int(2 * used * share),
                "engine": "mlx-lm 0.32",
                "dtype": "bf16",
                "layers": 48,
                "profile": "safe",
                "traffic": {
                    name: int(count * share * (luck if name in ("hit_tokens", "saved_s") else 1))
                    for name, count in total.items()
                },
            }
            for number, (alias, share, luck) in enumerate(shares)
        ],
    }  # fmt: skip
