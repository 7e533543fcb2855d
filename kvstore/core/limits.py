"""Internal limits that need no tuning: one table. Each name contains the unit, and a comment gives the reason.

`Config.limits` holds them. They are not configuration keys: no flag, variable or file sets them. Tests make a `Config`
with other limits, or set `DEFAULT` before a process starts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvstore.core.blocks import TOKEN_BYTES
from kvstore.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on queues, messages, calls and times. Raises ConfigError for values that contradict each other."""

    # Largest gRPC message, either way. KV travels in frames of 1 MiB; the token ids of a prompt travel in one message.
    message_bytes_max: int = 32 * MIB
    # Longest sequence. With 8 bytes a token its ids fill a message exactly.
    tokens_max: int = 4 * MIB
    # Open uploads, all workers together. Each has a thread while its bytes come, so this also bounds threads.
    uploads_max: int = 64
    # An upload that is slower than this over its whole length is dropped. It is less than a tenth of what 100 Mbit/s
    # carries: a slower upload would hold its place and its memory for minutes.
    upload_bytes_per_s_min: int = MIB
    # Calls in progress, all workers together. A call over the limit is refused: a queue would only make it late.
    calls_max: int = 256
    # Calls in progress on one connection: a quarter of all, so that one client cannot take every place.
    connection_calls_max: int = 64
    # Clients that called within the last seconds. The bound on connections is four times this, since one client may
    # hold several.
    connections_max: int = 256
    # A call is ended when its peer sends or takes nothing for this long: twice the default of `fetch_total_ms`, after
    # which a worker gives up.
    stream_stall_s: int = 10
    # An upload is dropped when nothing arrives for this long. Three stalls: a worker that lost its stream has time to
    # continue the same upload over another one.
    upload_idle_s: int = 30
    # Longest time that one fetch protects its files from eviction: six times the default of `fetch_total_ms`. A reader
    # that is still there has stalled.
    lease_s: int = 30
    # Time for calls and commits in progress after the order to stop. The service files in deploy/ kill after 30 s.
    grace_s: int = 10
    # Pause between two passes of the scrub. Silent damage is rare, and every hit is verified anyway.
    scrub_interval_days: int = 7
    # A shorter common prefix is a miss: computing so few tokens is faster than fetching them.
    min_prefix_tokens: int = 32
    # MLX memory of the daemon, which encodes in pieces of 8 MiB. The rest of the GPU belongs to the model servers.
    gpu_memory_bytes: int = 1024 * MIB
    # A fetch gives up without a connection after this, so it is what an absent daemon may cost a request. A daemon on
    # the same machine answers in less.
    fetch_connect_ms: int = 50
    # A fetch gives up when no bytes arrive for this long: a tenth of the default of `fetch_total_ms`.
    fetch_stall_ms: int = 500
    # New tokens after which a prompt that is being computed is stored: one step of mlx-lm's prefill. A server that is
    # killed loses as many.
    prefill_part_tokens: int = 2048
    # As many are copied between two steps at most, where the store fell behind: every running answer waits meanwhile.
    prefill_part_tokens_max: int = 8192
    # Tokens between the checkpoints of a prompt while it is computed. Each is a whole copy of the window and recurrent
    # layers and replaces the one before.
    prefill_checkpoint_tokens: int = 8192
    # Blobs that wait to be pushed to the remote store. The queue holds references: what waits costs no disk, and is
    # dropped if it is evicted first.
    remote_queue_bytes_max: int = 1024 * MIB
    # Pushes go no faster than this: a quarter of a gigabit link, so that restoring from it, here and elsewhere, stays
    # fast.
    remote_push_bytes_per_s_max: int = 32 * MIB
    # Limits that would delete more than a tenth of the store, at a start or by `kvstore set`, wait for this long: time
    # to read the warning and stop a daemon whose configuration has a typo.
    deletion_wait_s: int = 60
    # Share of the budget for open uploads. The other half stays with what is already stored.
    upload_share_percent: int = 50

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value < (0 if one.name == "grace_s" else 1):
                raise ConfigError(f"{one.name}: {value} is too small")
            if one.name.endswith("_percent") and value > 100:
                raise ConfigError(f"{one.name}: {value} is over 100")
        if self.tokens_max * TOKEN_BYTES > self.message_bytes_max:
            raise ConfigError(
                f"tokens_max: {self.tokens_max} tokens take {self.tokens_max * TOKEN_BYTES} bytes, over "
                f"message_bytes_max ({self.message_bytes_max})"
            )


DEFAULT = Limits()


def default_limits() -> Limits:
    """`DEFAULT` as it is now."""
    return DEFAULT
