"""Scripts of stores, evictions, repairs and starts, what each owes once it is acknowledged, and who checks the debt.

A script runs in a process that will not live to its end. Before and after each step it writes a line to a file that is
outside of what is at stake. The verifier reads the lines, opens the directory, and demands: what was acknowledged as
durable, and not given up since, is there bit for bit; what was acknowledged as deleted is not, also when the index is
lost on top of it; nothing else that is served is wrong; nothing is left over; the store goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.core.blocks import Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.engine import Engine, Fs, Lease, Selection, Terms, check_directory
from kvstore.errors import KVStoreError
from tests.faults.bugs import seeded
from tests.support.aux_blocks import basis_of, counted, list_aux, put_aux, put_referring
from tests.support.engine import (
    HYBRID,
    blob_path,
    blob_paths,
    chosen_by_auto,
    namespace,
    new_block,
    options,
    put,
    put_checkpoint,
    require_right,
    sequence,
)
from tests.support.files import files_below
from tests.support.packs import shipped, take_in

NS, MIXED = namespace(), namespace("mixed", HYBRID)
# Its blocks refer to a basis; those of the other one come by import.
BASED, MOVED, BASIS = namespace("based"), namespace("moved"), basis_of(1)
DIGEST = hashlib.sha256(BASIS).digest()
KEPT, GROWN, LONGER = list(range(300)), list(range(600)), list(range(1100))
EVICTED, SIDE, NEW = [-1, *range(600)], [*range(280), -7], [-2, *range(400)]
LOW_RANK = 400
ON_BASIS = list(range(9000, 9600))
HELD, TURN = list(range(5000, 5520)), list(range(5000, 5800))
# What may be asked for: name -> (namespace, tokens, whether up to a checkpoint).
SEQUENCES = {
    "kept": (NS, KEPT, False),
    "grown": (NS, GROWN, False),
    "longer": (NS, LONGER, False),
    "evicted": (NS, EVICTED, False),
    "side": (NS, SIDE, False),
    "new": (NS, NEW, False),
    "held": (MIXED, HELD, True),
    "turn": (MIXED, TURN, True),
    "based": (BASED, ON_BASIS, False),
    "moved": (MOVED, ON_BASIS, False),
}


@dataclass
class World:
    """What the steps of a run work with. `engine` is open between the steps `open` and `close`."""

    data_dir: Path
    fs: Fs
    durability: str = "commit"
    engine: Engine = field(init=False)
    lease: Lease = field(init=False)


@dataclass(frozen=True)
class Step:
    """`owes` is owed from its end; `drops` is not owed from its beginning; from its end `deletes` must not return."""

    act: Callable[[World], object]
    owes: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Script:
    """`prepare` makes the directory; `owed` is in it. With durability none nothing is ever owed."""

    prepare: Callable[[Path], None]
    steps: tuple[Step, ...]
    owed: tuple[str, ...] = ()
    durability: str = "commit"


def _store(name: str) -> Callable[[World], object]:
    def act(world: World) -> None:
        ns, tokens, exact = SEQUENCES[name]
        assert put(world.engine, ns, tokens).reason is Reason.OK
        if exact:
            assert put_checkpoint(world.engine, ns, tokens).reason is Reason.OK

    return act


def _put_basis(world: World) -> None:
    assert put_aux(world.engine, BASED, BASIS).reason is Reason.OK


def _store_based(world: World) -> None:
    assert put_referring(world.engine, BASED, ON_BASIS, DIGEST).reason is Reason.OK


@functools.cache
def _pack() -> tuple[tuple[int, bytes], ...]:
    """What an export of MOVED hands over."""
    with tempfile.TemporaryDirectory() as folder, Engine.open(Path(folder) / "data", options()) as engine:
        put_aux(engine, MOVED, BASIS)
        put_referring(engine, MOVED, ON_BASIS, DIGEST)
        return tuple(shipped(engine, MOVED.root))


def _import(world: World) -> None:
    assert take_in(world.engine, _pack()).reason is Reason.OK


def _evict_leaf(world: World) -> None:
    world.engine.evict(Selection(namespace_prefix=BASED.root, bytes=1))


def _open(world: World) -> None:
    world.engine = Engine.open(world.data_dir, options(durability=world.durability), world.fs)


def _close(world: World) -> None:
    world.engine.close()


def _evict(world: World) -> None:
    row = world.engine.match(Chain(NS.root, pack_tokens(EVICTED))).slices[0].row
    world.engine.evict(Selection(key_prefix=row.key))


def _evict_namespace(world: World) -> None:
    world.engine.evict(Selection(namespace_prefix=MIXED.root))


def _evict_by(selection: Selection) -> Callable[[World], object]:
    return lambda world: world.engine.evict(selection)


def _evict_leased(world: World) -> None:
    """Everything, while a reader needs the files of one sequence; it lets go in a later step."""
    rows = [part.row for part in world.engine.match(Chain(NS.root, pack_tokens(EVICTED))).slices]
    world.lease = world.engine.lease(rows)
    world.engine.evict(Selection(all=True))


def _let_go(world: World) -> None:
    world.lease.release()
    world.engine.maintain()


def _shrink(world: World) -> None:
    """A budget under which nothing stays, and the old one again."""
    budget_bytes = world.engine.budget_bytes
    world.engine.limit(0, 0)
    world.engine.limit(budget_bytes, 0)


def _store_auto(world: World) -> None:
    """As the profile `auto` does."""
    blocks = [chosen_by_auto(new) for new in sequence(NS, NEW)]
    assert world.engine.store(NS.to_record(), blocks).reason is Reason.OK


def _reencode(world: World) -> None:
    """All that `auto` stored, from its end on. The values stay, so that what is served can be compared."""
    while rows := world.engine.reencoder.coldest([NS.root], 1):
        row = rows[0]
        lower = new_block(row.root, row.parent, row.start, row.tokens, LOW_RANK)
        assert world.engine.reencoder.reencode(row, lower, 0.01)


def _pin(world: World) -> None:
    rows = [part.row.key for part in world.engine.match(Chain(NS.root, pack_tokens(KEPT))).slices]
    world.engine.keeper.pin(NS.root, rows[-1:])


def _limit_namespace(world: World) -> None:
    """A quota under which nothing of it stays."""
    world.engine.keeper.change_terms(MIXED.root, Terms(quota_bytes=1))


def _compact(world: World) -> None:
    """The index gets a file without the pages that are free by now."""
    assert world.engine._evictor.compaction.run()


def _fresh(data_dir: Path) -> None:
    with Engine.open(data_dir, options()) as engine:
        # Free pages in the index, so that a commit need not make its file grow: growth would sync more than was asked.
        for number in range(40):
            put(engine, namespace("filler"), range(number * 1000, number * 1000 + 600))
        engine.evict(Selection(all=True))
        for name in ("kept", "evicted", "held"):
            _put(engine, name)


def _holding(data_dir: Path, *names: str) -> None:
    with Engine.open(data_dir, options()) as engine:
        for name in names:
            _put(engine, name)


def _put(engine: Engine, name: str) -> None:
    ns, tokens, exact = SEQUENCES[name]
    put(engine, ns, tokens)
    if exact:
        put_checkpoint(engine, ns, tokens)


def _crashed(data_dir: Path) -> None:
    """As a kill left it: unclean, with every kind of left-over."""
    living = data_dir.with_name(data_dir.name + ".living")
    with Engine.open(living, options()) as engine:
        for name in ("kept", "evicted", "held"):
            _put(engine, name)
        shutil.copytree(living, data_dir)
    shutil.rmtree(living)
    whole = min(blob_paths(data_dir))
    shutil.copy(whole, whole.with_name(f"{'0' * 64}-77.safetensors"))
    whole.with_name(whole.name + ".tmp").write_bytes(b"torn")


def _without_index(data_dir: Path) -> None:
    _crashed(data_dir)
    (data_dir / "index" / "data.mdb").write_bytes(b"\xff" * 40960)


def _damaged(data_dir: Path) -> None:
    """One blob with a flipped bit, one that is gone, one without a row."""
    _fresh(data_dir)
    with Engine.open(data_dir, options()) as engine:
        paths = [blob_path(engine, part.row) for part in engine.match(Chain(NS.root, pack_tokens(EVICTED))).slices]
        _put(engine, "side")
        side = engine.match(Chain(NS.root, pack_tokens(SIDE))).slices[-1].row
        with engine._shared.index.edit() as edit:
            edit.remove(side)
    data = bytearray(paths[1].read_bytes())
    data[-3] ^= 4
    paths[1].write_bytes(data)
    paths[2].unlink()


_OPEN, _CLOSE = Step(_open), Step(_close)
_STORES = (
    Step(_store("grown"), ("grown",)),
    Step(_store("side"), ("side",)),
    Step(_store("longer"), ("longer",)),
    Step(_store("turn"), ("turn",)),
    Step(_store("new"), ("new",)),
)
_FRESH = ("kept", "evicted", "held")
# All that is not pinned: what is owed afterwards is owed to the pin, over a restart, too.
_EVICT_UNPINNED = Step(_evict_by(Selection(bytes=1 << 40)), drops=("evicted", "held"), deletes=("evicted", "held"))
SCRIPTS = {
    "keep": Script(
        _fresh,
        (
            _OPEN,
            Step(_pin),
            Step(_limit_namespace, drops=("held",), deletes=("held",)),
            _EVICT_UNPINNED,
            _CLOSE,
            _OPEN,
            _EVICT_UNPINNED,
            Step(_store("new"), ("new",)),
            Step(_store("side"), ("side",)),
            _CLOSE,
        ),
        _FRESH,
    ),
    "store": Script(_fresh, (_OPEN, *_STORES, _CLOSE), _FRESH),
    "evict": Script(
        _fresh,
        (
            _OPEN,
            Step(_evict, drops=("evicted",), deletes=("evicted",)),
            Step(_compact),
            Step(_store("new"), ("new",)),
            Step(_evict_namespace, drops=("held",), deletes=("held",)),
            _CLOSE,
        ),
        _FRESH,
    ),
    "evict last": Script(
        lambda data_dir: _holding(data_dir, "evicted"),
        (_OPEN, Step(_evict_by(Selection(all=True)), drops=("evicted",), deletes=("evicted",)), _CLOSE),
        ("evicted",),
    ),
    "evict all": Script(
        _fresh,
        (
            _OPEN,
            Step(_evict_leased, drops=_FRESH, deletes=_FRESH),
            Step(_store("new"), ("new",)),
            Step(_let_go),
            Step(_evict_by(Selection(idle_s=1e-6)), drops=("new",), deletes=("new",)),
            Step(_store("turn"), ("turn",)),
            Step(_shrink, drops=("turn",), deletes=("turn",)),
            _CLOSE,
        ),
        _FRESH,
    ),
    "re-encode": Script(
        _fresh,
        (_OPEN, Step(_store_auto, ("new",)), Step(_reencode), Step(_store("grown"), ("grown",)), _CLOSE),
        _FRESH,
    ),
    "bases": Script(
        _fresh,
        (
            _OPEN,
            Step(_put_basis),
            Step(_store_based, ("based",)),
            Step(_import, ("moved",)),
            Step(_evict_leaf, drops=("based",)),
            Step(_evict_by(Selection(namespace_prefix=BASED.root)), drops=("based",), deletes=("based",)),
            _CLOSE,
        ),
        _FRESH,
    ),
    "start": Script(_crashed, (_OPEN, Step(_store("grown"), ("grown",)), _CLOSE), _FRESH),
    "rebuild": Script(_without_index, (_OPEN, Step(_store("new"), ("new",)), _CLOSE), _FRESH),
    "repair": Script(
        _damaged,
        (_OPEN, Step(lambda world: world.engine.check(repair=True)), Step(_store("grown"), ("grown",)), _CLOSE),
        ("kept", "held"),
    ),
    "repair offline": Script(
        _damaged, (Step(lambda world: check_directory(world.data_dir, repair=True)),), ("kept", "held")
    ),
    "no durability": Script(_fresh, (_OPEN, *_STORES, Step(_evict), _CLOSE), durability="none"),
}


def run(name: str, data_dir: Path, acks: Path, bug: str = "", wrap: Callable[[Fs], Fs] = lambda fs: fs) -> None:
    """Carry out a script, with a seeded bug if named. `wrap` may look at every change of the disk, or end it all."""
    script = SCRIPTS[name]
    lines = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    at = 0

    def done() -> None:
        os.write(lines, b"done %d\n" % at)

    with seeded(bug, done) as fs:
        world = World(data_dir, wrap(fs), script.durability)
        for at, step in enumerate(script.steps):
            os.write(lines, b"begin %d\n" % at)
            step.act(world)
            done()


def debts(name: str, acks: Path) -> set[str]:
    """What is owed after these lines."""
    script = SCRIPTS[name]
    owed = set(script.owed)
    for line in acks.read_text().splitlines() if acks.exists() else []:
        word, number = line.split()
        step = script.steps[int(number)]
        owed = owed - set(step.drops) if word == "begin" else owed | set(step.owes)
    return owed if script.durability != "none" else set()


def deleted(name: str, acks: Path) -> set[str]:
    """What was acknowledged as deleted in these lines. No script stores it again."""
    lines = acks.read_text().splitlines() if acks.exists() else []
    done = [int(line.split()[1]) for line in lines if line.startswith("done")]
    return {each for number in done for each in SCRIPTS[name].steps[number].deletes}


def broken_promises(name: str, data_dir: Path, acks: Path, bug: str = "") -> list[str]:
    """What is wrong with a directory after a script was cut off; empty when every promise was kept.

    The start that follows is part of what is tested: with a seeded bug it has that too.
    """
    with seeded(bug, lambda: None) as fs:
        return _returned(name, data_dir, acks, fs) + _broken_promises(name, data_dir, acks, fs)


def _returned(name: str, data_dir: Path, acks: Path, fs: Fs) -> list[str]:
    """What was deleted and comes back when the index is lost, too, and made from the files."""
    gone = deleted(name, acks)
    if not gone:
        return []
    copy = data_dir.with_name(data_dir.name + ".lost")
    shutil.copytree(data_dir, copy)
    try:
        (copy / "index" / "data.mdb").unlink(missing_ok=True)
        with Engine.open(copy, options(), fs) as engine:
            return [f"returned without an index: {each}" for each in sorted(gone) if _tokens_found(engine, each)]
    except (KVStoreError, OSError) as error:
        return [f"refused, a start without an index: {type(error).__name__} {error}"]
    finally:
        shutil.rmtree(copy)


def _tokens_found(engine: Engine, name: str) -> int:
    ns, tokens, exact = SEQUENCES[name]
    return engine.match(Chain(ns.root, pack_tokens(tokens)), exact=exact).n_tokens


def _broken_promises(name: str, data_dir: Path, acks: Path, fs: Fs) -> list[str]:
    wrong: list[str] = []

    @contextlib.contextmanager
    def promised(what: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            wrong.append(f"{what}: {error}".split("\n")[0])
        except (KVStoreError, OSError) as error:
            # Whoever read this would have been told: no wrong bytes, but wrong all the same.
            wrong.append(f"refused, {what}: {type(error).__name__} {error}".split("\n")[0])

    owed, gone = debts(name, acks), deleted(name, acks)
    with promised("the next start"), Engine.open(data_dir, options(), fs) as engine:
        with promised("left over of uploads"):
            left = files_below(data_dir / "blobs.noindex", ".safetensors.tmp")
            assert not [path for path in left if not path.parent.name.endswith(".dropped")]
        with promised("a repair after the start"):
            # Damage that is older than the script is found by a check alone; a start looks for what a stop leaves.
            if name.startswith("repair"):
                engine.check(repair=True)
        with promised("in order"):
            engine.maintain()  # what a stop left of namespaces that were evicted goes now
            _require_order(engine)
        for each, (ns, tokens, exact) in SEQUENCES.items():
            match = engine.match(Chain(ns.root, pack_tokens(tokens)), exact=exact)
            with promised(f"wrong bytes: {each}"):
                require_right(engine, match, pack_tokens(tokens))
            if each in gone and match.n_tokens:
                wrong.append(f"returned: {each}, {match.n_tokens} tokens")
            if each in owed and match.n_tokens != len(tokens):
                wrong.append(f"lost: {each}, {match.n_tokens} of {len(tokens)} tokens")
        with promised("goes on"):
            assert put(engine, NS, LONGER).reason is Reason.OK
            _require_order(engine)
    return wrong


def _require_order(engine: Engine) -> None:
    """A check finds nothing, and every file has its row. Sizes are not compared: ext4 allocates when it likes."""
    found = engine.check().findings
    assert not found, found
    rows = {Path(info.path) for info in engine.list_blocks(limit=1 << 30)}
    files = blob_paths(engine._shared.directory.root)
    assert files == rows, f"{len(files - rows)} files without a row"
    for ns in (BASED, MOVED):
        said = {one.digest: one.blocks for one in list_aux(engine, ns.root) if one.blocks}
        assert said == counted(engine, ns.root) and engine.has_aux(ns.root, said), "a block without its basis"
