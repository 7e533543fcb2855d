"""What `kvstore pin` asks of the engine: a block by its key or a prompt, pinned or no longer; or all pins."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.core.keys import Chain
from kvstore.engine import Engine
from kvstore.errors import InvalidRequestError, NotFoundError
from kvstore.wire.v1 import kvstore_pb2 as pb


class Pinner:
    """Answers Pin. Blocks: it writes a file."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def reply(self, request: pb.PinRequest) -> pb.PinReply:
        """Pin, unpin or list. NotFoundError when nothing is stored there, LimitError when pins would keep too much."""
        keeper = self._engine.keeper
        if request.key_prefix and request.tokens:
            raise InvalidRequestError("a pin is of a key or of a prompt")
        if not (request.key_prefix or request.tokens):
            return self._message(keeper.pins.items())
        if request.remove:
            pins = self._pinned(request)
            keeper.unpin(list(pins))
        else:
            root, keys = self._found(request)
            pins = dict.fromkeys(keys, root)
            keeper.pin(root, keys)
        return self._message(pins.items())

    def _message(self, pins: Iterable[tuple[bytes, bytes]]) -> pb.PinReply:
        reply = pb.PinReply()
        reply.kept_bytes, reply.kept_bytes_max = self._engine.keeper.pinned_bytes()
        for key, root in pins:
            info, held = self._engine.namespace(root), self._engine.show(key)
            end = held[0].row.end if held else 0
            reply.pins.add(key=key, namespace_id=root, alias=info.alias if info else "", tokens=end)
        return reply

    def _pinned(self, request: pb.PinRequest) -> dict[bytes, bytes]:
        pins = self._engine.keeper.pins
        if request.tokens:
            found = [key for key in self._found(request)[1] if key in pins]
        else:
            found = [key for key in pins if key.startswith(request.key_prefix)]
        if not found:
            raise NotFoundError("no such pin; see: kvstore pin")
        if len(found) > 1 and request.key_prefix:
            raise InvalidRequestError(f"{len(found)} pins have a key that starts so; give more digits")
        return {key: pins[key] for key in found}

    def _found(self, request: pb.PinRequest) -> tuple[bytes, list[bytes]]:
        """The namespace and the keys to pin: of a prompt the last block that is stored, and the checkpoint after it."""
        if request.key_prefix:
            held = self._engine.show(request.key_prefix)
            if not held:
                raise NotFoundError("nothing is stored whose key starts so; see: kvstore ls --blocks")
            if len(held) > 1:
                raise InvalidRequestError(f"{len(held)} blocks have a key that starts so; give more digits")
            return held[0].row.root, [held[0].row.key]
        best: tuple[int, bytes, list[bytes]] = (0, b"", [])
        for one in self._engine.stats().namespaces:
            root = one.info.root
            if not root.startswith(request.namespace_prefix):
                continue
            match = self._engine.match(Chain(root, request.tokens), exact=bool(one.info.layout.exact_layers))
            if match.n_tokens > best[0]:
                rows = [part.row for part in match.slices[-1:]] + ([match.checkpoint] if match.checkpoint else [])
                best = match.n_tokens, root, [row.key for row in rows]
        if not best[0]:
            raise NotFoundError("nothing of this prompt is stored")
        return best[1], best[2]
