"""`kvstore why` against a real daemon, as a user asks: a changed header, an eviction, another adapter, a bad store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from mlx_lm.tokenizer_utils import load

from kvstore.cli.app import cli
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.core.blocks import pack_tokens
from kvstore.core.text import counted
from kvstore.errors import InvalidRequestError
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb
from kvstore.wire.v1 import kvstore_pb2_grpc as rpc
from tests.support.agent import copy_of, with_template
from tests.support.daemon import DaemonProcess, run_cli
from tests.support.sessions import patient
from tests.support.synthetic import make_layers, make_layout, make_namespace

LAYOUT = make_layout(layers=2, heads=1, width=32)
SMALL_LM = Path(__file__).parents[1] / "models" / "small-lm"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and tools %}\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>"
    "{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RULES = "You are a coding agent. Use the tools that you are given, and say what you do. " * 20
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("read", "write")]


class Agent:
    """A coding agent whose first line has a hash that differs in every request, served by a model."""

    def __init__(self, model: Path, session: Session, folder: Path) -> None:
        self.tokenizer = load(model)
        self.session = session
        self.path = folder / "prompt.json"

    def body(self, digest: str, question: str = "What is in the file?") -> dict[str, Any]:
        """A request."""
        header = f"x-anthropic-billing-header: cc_version=2.1.37.{digest[:3]}; cc_entrypoint=cli; cch={digest};"
        system = {"role": "system", "content": f"{header}\n{RULES}"}
        return {"messages": [system, {"role": "user", "content": question}], "tools": TOOLS}

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """Its prompt, as a server makes it."""
        options = {"tools": body["tools"], "tokenize": True, "add_generation_prompt": True}
        return list(self.tokenizer.apply_chat_template(body["messages"], **options))

    def ask(self, body: dict[str, Any], *, store: bool = True) -> int:
        """A request that is served, and stored unless said otherwise; tokens restored."""
        tokens = self.tokens(body)
        found = self.session.fetch(tokens)
        if store:
            assert self.session.store(tokens, make_layers(LAYOUT, tokens), wait=True).durable
        return found.n_tokens

    def file(self, body: dict[str, Any]) -> str:
        """The request as a file."""
        self.path.write_text(json.dumps(body))
        return str(self.path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's tokenizer with a template that has roles and tools."""
    return with_template(copy_of(SMALL_LM, tmp_path_factory.mktemp("model") / "small-lm"), TEMPLATE)


@pytest.fixture
def agent(model: Path, client: Client, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Agent]:
    """An agent with a namespace of its own, under the alias of the model."""
    namespace = make_namespace(LAYOUT, "small-lm", adapter=request.node.name.encode())
    yield Agent(model, patient(client, namespace), tmp_path)
    client.evict(all=True)


def said(daemon: DaemonProcess, *arguments: str, code: int = 0) -> str:
    """What the verb prints, with single spaces, when it exits with `code`. In this process: tokenizers load slowly."""
    ended = CliRunner().invoke(cli, ["why", *arguments, "--address", daemon.listen])
    assert ended.exit_code == code, ended.output
    return re.sub(" +", " ", ended.stdout if not code else ended.stderr)


def test_a_changed_header_is_named_and_an_eviction_and_another_adapter(
    shared_daemon: DaemonProcess, client: Client, agent: Agent, model: Path
) -> None:
    """The transcript of a user whose prompts never hit."""
    assert agent.ask(agent.body("0d9fa")) == 0
    restored = agent.ask(agent.body("1f3aa"))
    assert 20 < restored < 60
    text = said(shared_daemon, "--last", "1", "--model", str(model))
    assert f"{restored} of " in text and "billing header" in text
    assert "where system" in text and "cc_version=2.1.37." in text and '"1f3; cc' in text and '"0d9; cc' in text
    assert "its store" in text

    # The same of a prompt that nobody has asked yet, and without a tokenizer as token ids.
    text = said(shared_daemon, "--prompt-file", agent.file(agent.body("77abb")), "--model", str(model))
    assert "billing header" in text and "where system" in text
    tokens = agent.tokens(agent.body("77abb"))
    text = said(shared_daemon, " ".join(map(str, tokens)))
    assert " ".join(map(str, tokens[restored : restored + 12])) in text and "billing" not in text

    # One served with another adapter.
    namespace = make_namespace(LAYOUT, "small-lm", adapter=b"another")
    other = Agent(model, patient(client, namespace), agent.path.parent)
    assert other.ask(agent.body("1f3aa"), store=False) == 0
    text = said(shared_daemon, "--last", "1", "--model", str(model))
    assert "stored for another identity: another adapter" in text

    # Evicted: what was noted is gone, and the next request is told why.
    client.evict(namespace_prefix=agent.session.namespace.root)
    assert "billing" not in said(shared_daemon, "--last", "9", "--model", str(model))
    path = agent.file(agent.body("1f3aa"))
    assert "has been evicted" in said(shared_daemon, "--prompt-file", path, "--model", str(model))
    assert agent.ask(agent.body("1f3aa"), store=False) == 0
    assert "has been evicted" in said(shared_daemon, "--last", "1")


def test_the_daemon_notices_a_nonce_by_itself(shared_daemon: DaemonProcess, client: Client, agent: Agent) -> None:
    """One WARN, and a line in stats."""
    for digest in ("0d9fa", "1f3aa", "77abb", "c0ffe"):
        agent.ask(agent.body(digest))
    warned = [line for line in shared_daemon.log_text().splitlines() if "share their first" in line]
    assert len(warned) == 1 and "WARNING" in warned[0] and "prompts of small-lm" in warned[0]
    (place,) = client.stats()["places"]
    assert (place["alias"], place["namespace_id"]) == ("small-lm", agent.session.namespace.root.hex())
    assert "small-lm: 4 prompts share" in run_cli(["stats"], shared_daemon.environ()).stdout


@pytest.mark.parametrize(
    ("change", "region"),
    [
        (lambda body: body["tools"].reverse(), "tools"),
        (lambda body: body["messages"][0].update(content=body["messages"][0]["content"] + "More."), "system"),
        (lambda body: body["messages"][1].update(content="Another question, please."), "message 2 (user)"),
    ],
)
def test_the_region_of_the_place_is_named(
    shared_daemon: DaemonProcess, agent: Agent, model: Path, change: Any, region: str
) -> None:
    """From the messages of a file, and, where the template marks messages, from the tokens of a request alone."""
    before, after = agent.body("0d9fa"), agent.body("0d9fa")
    after["tools"] = list(TOOLS)
    change(after)
    agent.ask(before)
    agent.ask(after, store=False)
    arguments = (["--prompt-file", agent.file(after)], ["--last", "1"])
    rows = [json.loads(said(shared_daemon, *one, "--model", str(model), "--json"))["found"][0] for one in arguments]
    assert [(row["cause"], row["region"]) for row in rows] == [("changed", region)] * 2


def test_what_is_stored_and_unknown_changes_claim_nothing(
    shared_daemon: DaemonProcess, agent: Agent, model: Path
) -> None:
    """Both sides are shown; JSON has token ids as numbers."""
    agent.ask(agent.body("0d9fa"))
    path = agent.file(agent.body("0d9fa"))
    text = said(shared_daemon, "--prompt-file", path, "--model", str(model))
    assert re.match(r"small-lm: hit, [\d,]+ of [\d,]+ tokens are stored", text) and "cause" not in text
    agent.ask(agent.body("0d9fa"), store=False)
    text = said(shared_daemon, "--last", "1")
    assert re.match(r"small-lm: hit, .* tokens are stored \(an engine computes the last one\) ", text)
    assert "cause" not in text and "offered" not in text
    path = agent.file(agent.body("0d9fa", "What is in the house?"))
    text = said(shared_daemon, "--prompt-file", path, "--model", str(model))
    assert "no pattern that is known" in text and "house" in text and "file" in text
    row = json.loads(said(shared_daemon, "--prompt-file", path, "--model", str(model), "--json"))["found"][0]
    assert row["change"] is None and row["asked"] != row["stored"] and len(row["before"]) == 12
    assert row["cause"] == "changed" and all(isinstance(token, int) for token in row["asked"])


def test_a_store_that_was_refused_is_told(shared_daemon: DaemonProcess, agent: Agent) -> None:
    """Beside the miss, and as the cause of the next."""
    namespace, tokens = agent.session.namespace, agent.tokens(agent.body("0d9fa"))
    assert not agent.session.fetch(tokens)
    request = pb.BeginStoreRequest(
        namespace=namespace_to_message(namespace),
        layout=namespace.layout.record,
        tokens=pack_tokens(tokens),
        captured_from=64,  # and the daemon does not have what is before that
    )
    with grpc.insecure_channel(shared_daemon.listen) as channel:
        assert rpc.KVStoreStub(channel).BeginStore(request).reason == "not_captured"
    assert "its store 0 of" in said(shared_daemon, "--last", "1")
    assert not agent.session.fetch(tokens)
    assert "refused: not_captured" in said(shared_daemon, "--last", "1")


def test_nothing_of_tenants_is_shown(shared_daemon: DaemonProcess, client: Client, model: Path, tmp_path: Path) -> None:
    """Neither of requests nor of prompts that an admin guesses."""
    tenant = Agent(model, patient(client, make_namespace(LAYOUT, "tenant-lm", salt=b"secret")), tmp_path)
    tenant.ask(tenant.body("0d9fa"))
    tenant.ask(tenant.body("1f3aa"))
    answer = client.why(last=256)
    assert not [one for one in answer["found"] if one["alias"] == "tenant-lm"] and answer["not_kept"] >= 2
    with pytest.raises(InvalidRequestError, match="tenant"):
        client.why(tenant.tokens(tenant.body("0d9fa")), alias="tenant-lm")


def test_that_namespaces_were_not_searched_is_said(
    shared_daemon: DaemonProcess, client: Client, agent: Agent, model: Path, tmp_path: Path
) -> None:
    """A prompt that is a tenant's own is not to look as if it were stored nowhere."""
    agent.ask(agent.body("0d9fa"))
    Agent(model, patient(client, make_namespace(LAYOUT, "tenant-lm", salt=b"other")), tmp_path).ask(agent.body("1f3aa"))
    left_out = client.why([1, 2, 3])["left_out"]
    assert left_out >= 1
    ended = CliRunner().invoke(cli, ["why", "1 2 3", "--address", shared_daemon.listen])
    assert f"{counted(left_out, 'namespace')} not searched" in ended.stderr
    assert client.why([1, 2, 3], namespace_prefix=agent.session.namespace.root)["left_out"] == 0


def test_a_prompt_of_one_token_is_told_that_it_has_nothing_to_restore(
    shared_daemon: DaemonProcess, agent: Agent
) -> None:
    """It is not too short for the store: no prompt of one token is."""
    agent.ask(agent.body("0d9fa"))
    text = said(shared_daemon, "5", "--namespace", agent.session.namespace.root.hex()[:12], code=2)
    assert "nothing to restore" in text and "below_threshold" not in text


def test_wrong_questions_are_one_line(shared_daemon: DaemonProcess, model: Path, tmp_path: Path) -> None:
    """With the way out."""
    path = tmp_path / "prompt.json"
    path.write_text("{}")
    assert "give one of" in said(shared_daemon, code=2)
    assert "--model" in said(shared_daemon, "Hello there", code=2)
    assert "prompt" in said(shared_daemon, "--prompt-file", str(path), "--model", str(model), code=2)
    assert "nope" in said(shared_daemon, "--prompt-file", str(tmp_path / "nope.txt"), code=2)
    assert "nope" in said(shared_daemon, "Hello", "--model", str(tmp_path / "nope"), code=2)
    assert "nope-lm" in said(shared_daemon, "1 2 3", "--namespace", "nope-lm", code=1)
