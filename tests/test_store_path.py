"""The STORE path inside the daemon: what a block may claim to be, and uploads that get in each other's way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from kvstore.codecs.device import Capture
from kvstore.core.blocks import FIDELITY_EXACT, Reason, pack_tokens
from kvstore.core.keys import Chain
from kvstore.core.layers import KVLayer
from kvstore.engine import Engine, EngineOptions, Selection
from kvstore.errors import DeadlineError, LimitError, UnavailableError
from kvstore.server.asked_prompt import StoreRequest
from kvstore.server.fetching.fetch import FetchPath
from kvstore.server.lane import Lane
from kvstore.server.storing.store import StoreOutcome, StorePath, StorePlan
from tests.support import engine as hybrid
from tests.support.files import paths_below
from tests.support.intake import BytesSource, carry_out
from tests.support.limits import make_config
from tests.support.synthetic import make_layers, make_layout, make_namespace
from tests.support.telemetry import make_telemetry

LAYOUT = make_layout(layers=1, heads=1)
NAMESPACE = make_namespace(LAYOUT)
TOKENS = list(range(1000, 1600))
CHAIN = Chain(NAMESPACE.root, pack_tokens(TOKENS))
AFFINE4 = 400


class Rig:
    """Engine, lane and the two paths, without RPC."""

    def __init__(self, folder: Path, budget_bytes: int = 1 << 30, **settings: object) -> None:
        quiet = {"profile": "affine8", **settings}
        self.config = make_config(data_dir=folder, min_prefix_tokens=1, **quiet)
        options = EngineOptions(budget_bytes, durability=self.config.durability, master_key=bytes(range(32)))
        self.engine = Engine.open(folder, options)
        self.lane = Lane()
        self.path = StorePath(self.engine, self.lane, self.config)
        self.fetch = FetchPath(self.engine, self.lane, self.config)

    def begin(self, tokens: list[int], profile: str = "", restored: int = 0, fidelity: int = 0) -> StorePlan:
        """Plan a store of which everything was captured."""
        chain, telemetry = Chain(NAMESPACE.root, pack_tokens(tokens)), make_telemetry()
        request = StoreRequest(chain, NAMESPACE.info, 0, restored, fidelity, profile, telemetry=telemetry)
        return self.path.begin(request)

    def hand_over(self, plan: StorePlan, layers: list[KVLayer]) -> None:
        """Let what the plan wants be there."""
        assert plan.upload is not None
        upload = plan.upload
        capture = Capture(layers, upload.start, upload.n_tokens)
        views = [view for piece in upload.pieces for view in capture.piece_views(LAYOUT, piece)]
        upload.intake.open(BytesSource(views))

    def store(self, tokens: list[int], wrong_from: int | None = None, **details: object) -> StoreOutcome:
        """A whole store; rows from `wrong_from` on are those of a model that read a lossy prefix."""
        plan = self.begin(tokens, **details)  # type: ignore[arg-type]
        assert plan.upload is not None, plan
        self.hand_over(plan, shifted(make_layers(LAYOUT, tokens), wrong_from))
        return carry_out(self.path, plan.upload)

    def exact_tokens(self, tokens: list[int]) -> int:
        """How many leading tokens a session that takes exact data only is given."""
        return self.fetch.match(Chain(NAMESPACE.root, pack_tokens([*tokens, 0])), FIDELITY_EXACT).n_tokens

    def key_files(self) -> list[Path]:
        """Files of namespace keys."""
        return list(self.engine._shared.directory.root.with_name("data.keys").rglob("*.json"))

    def files(self) -> list[Path]:
        """Whatever lies among the blobs."""
        return [path for path in paths_below(self.engine._shared.directory.blobs) if ".safetensors" in path.name]

    def require(self, **settings: object) -> None:
        """Go on with these settings."""
        self.config = replace(self.config, **settings)  # type: ignore[arg-type]
        self.path._config = self.path.receiver._config = self.config

    def close(self) -> None:
        """Stop."""
        self.lane.close()
        self.engine.close()


def shifted(layers: list[KVLayer], wrong_from: int | None) -> list[KVLayer]:
    """The layers with other values from a position on."""
    if wrong_from is None:
        return layers

    def shift(array: mx.array) -> mx.array:
        late = mx.arange(array.shape[2])[None, None, :, None] >= wrong_from
        return mx.where(late, array + 1.0, array).astype(array.dtype)

    return [replace(one, keys=(shift(one.keys[0]),), values=(shift(one.values[0]),)) for one in layers]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A daemon's inside that keeps short sequences raw, so that only their origin tells what they are worth."""
    made = Rig(tmp_path / "data", min_quantize_tokens=500)
    yield made
    made.close()


def test_what_was_computed_after_restored_tokens_is_no_better_than_they(rig: Rig) -> None:
    """Although the blocks of these tokens were stored exactly by somebody else meanwhile."""
    prefix = TOKENS[:256]
    rig.require(min_quantize_tokens=1)
    rig.store(prefix, profile="affine4")
    rig.require(min_quantize_tokens=500)
    rig.store(prefix, profile="raw")
    assert rig.exact_tokens(prefix) == 256
    rig.store(TOKENS[:300], wrong_from=256, restored=256, fidelity=AFFINE4)
    assert rig.exact_tokens(TOKENS[:300]) == 256


def test_extending_a_tail_does_not_forget_what_it_was_computed_from(rig: Rig) -> None:
    """The runs of a raw tail are exact; the lossy blocks before it, since replaced, were not."""
    rig.require(min_quantize_tokens=1)
    rig.store(TOKENS[:256], profile="affine4")
    rig.require(min_quantize_tokens=500)
    rig.store(TOKENS[:300], wrong_from=256, restored=256, fidelity=AFFINE4)
    rig.store(TOKENS[:256], profile="raw")
    rig.store(TOKENS[:310])
    assert rig.exact_tokens(TOKENS[:310]) == 256


def test_a_session_does_not_wait_for_what_will_not_be_good_enough(rig: Rig) -> None:
    """Another worker sends the same tokens, computed after a lossy prefix."""
    lossy = rig.begin(TOKENS[:400], profile="raw", restored=100, fidelity=AFFINE4)
    mine = rig.begin(TOKENS[:400], profile="raw")
    assert lossy.upload is not None
    assert mine.upload is not None
    assert mine.upload.depends_on == ()
    assert mine.upload.start == 0


def test_planning_an_extension_does_not_evict_what_it_extends(tmp_path: Path) -> None:
    """The prefix is the least recently used of a full store."""
    rig = Rig(tmp_path / "data", profile="raw")
    rig.store(TOKENS[:512])
    for number in range(4):
        rig.store([number] * 512)
    rig.engine.limit(rig.engine.used_bytes + 4096, 0)
    assert rig.store(TOKENS[:600]).stored_tokens == 600
    rig.close()


def test_a_commit_that_has_begun_is_nobody_elses_to_end(rig: Rig) -> None:
    """Neither a late chunk's handler nor the reaper takes the bytes away from under it."""
    plan = rig.begin(TOKENS[:300])
    assert plan.upload is not None
    rig.hand_over(plan, make_layers(LAYOUT, TOKENS[:300]))
    upload = plan.upload
    upload.intake.commit()
    rig.path.uploads.give_up(upload)
    assert rig.path.uploads.reap(0.0) == []
    outcome = carry_out(rig.path, upload)
    assert (outcome.stored_tokens, outcome.reason) == (300, Reason.OK)


def test_an_upload_that_was_reaped_cannot_be_committed(rig: Rig) -> None:
    """And leaves nothing. Its worker hears that it was late, and not that something was evicted."""
    plan = rig.begin(TOKENS[:300])
    assert plan.upload is not None
    plan.upload.intake._moved_s -= 100
    plan.upload.intake._waiting_since_s -= 100
    assert rig.path.uploads.reap(10.0) == [plan.upload]
    with pytest.raises(DeadlineError, match="for 10 s"):
        rig.path.uploads.get(plan.upload.upload_id)
    plan.upload.release()
    assert rig.files() == []


def test_stopping_leaves_a_running_commit_its_bytes(rig: Rig) -> None:
    """What was accepted goes through; everything else is given up."""
    accepted, idle = rig.begin(TOKENS[:300]), rig.begin([7] * 300)
    assert accepted.upload is not None
    rig.hand_over(accepted, make_layers(LAYOUT, TOKENS[:300]))
    upload = accepted.upload
    upload.intake.commit()
    rig.path.uploads.end_all()
    assert idle.upload is not None
    assert rig.path.uploads.under_way() == [upload]
    assert carry_out(rig.path, upload).stored_tokens == 300
    assert rig.path.uploads.under_way() == []


def test_an_upload_that_is_too_slow_in_all_is_given_up_although_it_moves(rig: Rig) -> None:
    """The time that it may take follows from its size."""
    plan = rig.begin(TOKENS[:300])
    assert plan.upload is not None
    plan.upload.intake._waiting_since_s -= 100
    rate = plan.upload.upload_bytes // 95
    assert rig.path.uploads.reap(10.0, rate) == []
    assert rig.path.uploads.reap(10.0, 2 * rate) == [plan.upload]


def test_claims_are_bounded_together_and_one_that_never_fits_is_full(tmp_path: Path) -> None:
    """What is refused costs nothing; what ends makes room."""
    rig = Rig(tmp_path / "data", budget_bytes=30_000 * LAYOUT.token_bytes, upload_share_percent=1)
    first = rig.begin(TOKENS[:200])
    assert first.upload is not None
    with pytest.raises(LimitError) as refused:
        rig.begin([7] * 200)
    assert refused.value.retry_s > 0
    assert rig.begin(TOKENS[:400] + [8] * 200).reason is Reason.STORE_FULL
    assert len(rig.path.uploads.under_way()) == 1
    rig.path.uploads.give_up(first.upload)
    assert rig.begin([7] * 200).upload is not None
    rig.close()


def test_the_share_of_uploads_follows_the_budget_in_force(tmp_path: Path) -> None:
    """As `kvstore set daemon budget_bytes=...` changes it."""
    rig = Rig(tmp_path / "data", budget_bytes=30_000 * LAYOUT.token_bytes, upload_share_percent=1)
    assert rig.begin(TOKENS[:600]).reason is Reason.STORE_FULL
    rig.engine.limit(90_000 * LAYOUT.token_bytes, 0)
    assert rig.begin(TOKENS[:600]).upload is not None
    rig.close()


def test_an_exact_session_after_a_lossy_restore_hears_that_it_is_the_fidelity(rig: Rig) -> None:
    """What it brings is stored, and does not count as exact."""
    rig.require(min_quantize_tokens=1)
    rig.store(TOKENS[:256], profile="affine4")
    outcome = rig.store(TOKENS[:300], profile="raw", restored=256, fidelity=AFFINE4)
    assert (outcome.stored_tokens, outcome.reason) == (0, Reason.FIDELITY)


EVICTED: dict[str, Selection] = {
    "key": Selection(key_prefix=CHAIN.key(0)),
    "key of what is still to come": Selection(key_prefix=CHAIN.key(1)[:6]),
    "idle": Selection(idle_s=1e-9),
    "bytes": Selection(bytes=1 << 40),
    "namespace": Selection(namespace_prefix=NAMESPACE.root[:4]),
    "all": Selection(all=True),
}


@pytest.mark.parametrize("name", EVICTED)
def test_an_eviction_ends_the_uploads_that_bring_or_continue_what_it_takes(rig: Rig, name: str) -> None:
    """Others go on."""
    rig.store(TOKENS[:256])
    mine, other = rig.begin(TOKENS), rig.begin([9, *TOKENS[:300]])
    assert mine.upload is not None and other.upload is not None
    rig.engine.evict(EVICTED[name])
    rig.path.end_evicted()
    assert rig.path.uploads.under_way() == ([] if name in ("namespace", "all") else [other.upload])


def test_a_commit_that_the_stop_cannot_wait_for_leaves_nothing(rig: Rig) -> None:
    """It ends at its next block, and its blobs with it."""
    plan = rig.begin(TOKENS)
    assert plan.upload is not None
    rig.hand_over(plan, make_layers(LAYOUT, TOKENS))
    plan.upload.intake.commit()
    rig.path.give_up()
    with pytest.raises(UnavailableError):
        carry_out(rig.path, plan.upload)
    assert rig.engine.stats().blobs == 0
    assert rig.files() == []


def test_an_upload_that_was_encrypted_is_never_stored_plain(tmp_path: Path) -> None:
    """The key is dropped while it is under way: nothing of it is kept, and what comes next is encrypted again."""
    rig = Rig(tmp_path / "data", profile="raw", encrypt="all", encryption_key=tmp_path / "key")
    rig.store(TOKENS[:256])
    uploads = [rig.begin(tokens) for tokens in (TOKENS[:400], TOKENS[300:600])]
    for plan, tokens in zip(uploads, (TOKENS[:400], TOKENS[300:600]), strict=True):
        rig.hand_over(plan, make_layers(LAYOUT, tokens))
    assert rig.engine.shred(NAMESPACE.root) == 1
    rig.engine.evict(Selection(namespace_prefix=NAMESPACE.root))
    for plan in uploads:
        assert plan.upload is not None
        assert carry_out(rig.path, plan.upload).stored_tokens == 0
    assert not rig.engine.stats().blobs
    rig.store(TOKENS[:300])
    assert rig.engine.is_encrypted(NAMESPACE.root)
    assert len(rig.key_files()) == 1
    rig.close()


def test_an_upload_that_is_given_up_leaves_no_key(tmp_path: Path) -> None:
    """A worker that only ever begins cannot fill the directory with keys."""
    rig = Rig(tmp_path / "data", profile="raw", encrypt="all", encryption_key=tmp_path / "key")
    plan = rig.begin(TOKENS)
    assert plan.upload is not None and plan.upload.encryption is not None
    assert rig.engine.is_encrypted(NAMESPACE.root)
    rig.path.uploads.give_up(plan.upload)
    del plan
    gc.collect()
    assert not rig.engine.is_encrypted(NAMESPACE.root)
    assert rig.key_files() == []
    rig.close()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_splice_source_that_was_evicted_is_named_evicted_not_corrupt(rig: Rig, damaged: bool) -> None:
    """A store builds on a tail that makes room, or breaks, while the upload is under way: the answer tells which."""
    rig.store(TOKENS[:490])
    plan = rig.begin(TOKENS[:499])
    assert plan.upload is not None
    [piece] = plan.upload.spliced
    rig.hand_over(plan, make_layers(LAYOUT, TOKENS[:499]))
    path = Path(rig.engine.path(piece.row.blob))
    if damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        # The budget wins over the lease of the upload. The tail is the only leaf, and large enough for what is asked.
        rig.engine.limit(rig.engine.used_bytes - 1, 0)
        rig.engine.limit(1 << 30, 0)
        assert not path.exists()
    outcome = carry_out(rig.path, plan.upload)
    assert outcome.reason is (Reason.CORRUPT if damaged else Reason.EVICTED)
    assert rig.engine.stats().quarantined == damaged


def test_a_checkpoint_within_a_prompt_lasts_once_a_prompt_ends_there(rig: Rig) -> None:
    """All of it is stored already, and yet it is not the same: the next one of the sequence no longer replaces it."""
    namespace = hybrid.namespace("hybrid", hybrid.HYBRID)
    for end, lasts in ((300, True), (450, False)):
        tokens = [end, *range(1, end)]
        interim = replace(hybrid.checkpoint(namespace, tokens), interim=True)
        rig.engine.store(namespace.to_record(), [*hybrid.sequence(namespace, tokens), interim])
        chain = Chain(namespace.root, pack_tokens(tokens))
        for is_interim in (True, not lasts):
            offered = StoreRequest(chain, namespace.info, 0, 0, 0, "", telemetry=make_telemetry())
            request = replace(offered, states=interim.block.states, interim=is_interim)
            assert rig.path.begin(request).reason is Reason.ALREADY_STORED
        longer = [*tokens, *range(900, 1000)]
        blocks = hybrid.sequence(namespace, longer)
        rig.engine.store(namespace.to_record(), [*blocks, hybrid.checkpoint(namespace, longer)])
        assert (rig.engine.checkpoint_at(chain) is not None) is lasts
