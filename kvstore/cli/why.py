"""`kvstore why`: why a prompt, or the latest requests, missed: where they part from what is stored, what changed."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.changes import name_change
from kvstore.cli.common import (
    client_config,
    common_options,
    connected,
    counted,
    note,
    print_facts,
    print_json,
    say,
    size_text,
    span_text,
)
from kvstore.cli.names import require_namespace
from kvstore.core.blocks import unpack_tokens
from kvstore.core.causes import Cause, cause_words
from kvstore.core.reasons import NOT_NEEDED, words_of
from kvstore.core.remote_words import words_of as remote_words_of
from kvstore.errors import InvalidRequestError, NotFoundError
from kvstore.integrations.prompts import (
    Prompt,
    load_tokenizer,
    prompt_of,
    read_prompt,
    region,
    region_of_text,
    text_after,
)

if TYPE_CHECKING:
    from kvstore.client.client import Client

SIDE_TOKENS = 12
# Text before the place that the patterns see.
BEFORE_CHARACTERS = 4000
SEE = "docs/operations.md#reason-codes"
# What to do about a cause, where that does not depend on what changed.
_CURES = {
    Cause.EVICTED: "a larger budget keeps more: kvstore set daemon budget_bytes=SIZE",
    Cause.EXPIRED: "a longer time to live keeps more: kvstore set NAMESPACE ttl=TIME",
    Cause.NEVER_STORED: "nothing, if this is the first time; else see whether its store was refused: kvstore stats",
    Cause.IDENTITY: "serve with the same files, adapter, engine and profile, or let it be stored again",
}


@click.command("why")
@click.argument("prompt", required=False)
@click.option("--prompt-file", metavar="FILE", help="Text, .json with messages or a request body, or .npy with tokens.")
@click.option("--last", type=click.IntRange(1, 256), metavar="N", help="The latest N requests, the newest first.")
@click.option("--model", metavar="PATH", help="Model whose tokenizer turns tokens into text.")
@click.option("--namespace", metavar="ID|ALIAS", help="Look here; else where the latest request did.")
@common_options
def command(
    prompt: str | None,
    prompt_file: str | None,
    last: int | None,
    model: str | None,
    namespace: str | None,
    address: str | None,
    config_path: str | None,
    as_json: bool,
) -> None:
    """Say why PROMPT (text with --model, or tokens as 1,2,3), a file, or the --last requests were not restored whole.

    The answer shows the nearest stored prompt, the 12 tokens on both sides of the place where the two part, and what
    changed there if that is known. If all of the prompt is stored, it says `hit`. The daemon remembers 256 requests, in
    memory, and none of encrypted namespaces or of tenants.
    """
    if sum(one is not None for one in (prompt, prompt_file, last)) != 1:
        raise click.UsageError("give one of PROMPT, --prompt-file and --last")
    tokenizer, given = None, None
    if model is not None:
        tokenizer = load_tokenizer(model)
    if last is None:
        given = _prompt(prompt, prompt_file, tokenizer)
    with connected(client_config(address, config_path)) as client:
        answer = _ask(client, given, last or 0, namespace, model)
    rows = [_row(one, tokenizer, given) for one in answer["found"]]
    if as_json:
        print_json({"found": rows, **{name: answer[name] for name in ("not_kept", "not_noted", "left_out")}})
        return
    for row in rows:
        print_facts(_title(row), _facts(row))
    if answer["not_noted"]:
        note(f"{counted(answer['not_noted'], 'request')} not remembered yet, the disk is slow: ask again later")
    elif last is not None and not rows:
        say("no request is remembered: none has come since the daemon started, or what they found was evicted")
    if last is not None and answer["not_kept"]:
        kinds = "encrypted, of salted tenants, too many at once, or noted too late"
        note(f"of {answer['not_kept']:,} requests nothing is kept: {kinds}")
    if answer["left_out"]:
        note(f"{counted(answer['left_out'], 'namespace')} not searched: encrypted, or of tenants with a salt")
    if rows and tokenizer is None and any(row["asked"] for row in rows):
        note("with --model PATH the tokens become text, and what changed is named")


def _prompt(text: str | None, path: str | None, tokenizer: Any) -> Prompt:
    if path is not None:
        found = read_prompt(path, tokenizer)
    elif tokenizer is None and text is not None and re.fullmatch(r"[\s,\[\]\d-]+", text):
        found = Prompt([int(token) for token in re.findall(r"-?\d+", text)])
    else:
        found = prompt_of(text, tokenizer)
    if not found.tokens:
        raise InvalidRequestError("the prompt is empty")
    return found


def _ask(client: Client, given: Prompt | None, last: int, namespace: str | None, model: str | None) -> dict[str, Any]:
    """The daemon's answer. A prompt is looked up for the model that is named, if workers or the store know its name."""
    tokens, context = given.tokens if given is not None else (), model is not None
    if namespace:
        try:
            prefix = require_namespace(client, namespace)
        except NotFoundError:  # it holds nothing any more, and workers may have named it all the same
            return client.why(tokens, last=last, alias=namespace, context=context)
        return client.why(tokens, last=last, namespace_prefix=prefix, context=context)
    if given is not None and model is not None:
        from kvstore.integrations.model_names import alias_of

        with contextlib.suppress(NotFoundError):  # served under another name
            return client.why(tokens, alias=alias_of(model), context=context)
    return client.why(tokens, last=last, context=context)


def _row(found: dict[str, Any], tokenizer: Any, given: Prompt | None) -> dict[str, Any]:
    """One row of the answer with token ids as numbers, and, with a tokenizer, their text, region and what changed."""
    row = {key: value for key, value in found.items() if key not in ("prefix", "asked_more", "stored_more")}
    row["store"] = found["store"] if found["store"]["reason"] else None
    for name in ("before", "asked", "stored"):
        row[name] = _ids(found[name])
    row["text"], row["region"], row["change"] = None, "", None
    if tokenizer is None:
        return row
    common = found["common_tokens"]
    prefix = given.tokens[:common] if given is not None else _ids(found["prefix"]) or row["before"]
    asked, stored = _ids(found["asked_more"]) or row["asked"], _ids(found["stored_more"]) or row["stored"]
    row["text"] = {
        "before": text_after(tokenizer, prefix[:-SIDE_TOKENS], row["before"]),
        **{name: text_after(tokenizer, row["before"], row[name]) for name in ("asked", "stored")},
    }
    if found["cause"] == Cause.WHOLE:
        return row
    row["region"] = _region(tokenizer, given, prefix, common)
    if row["stored"]:
        before = tokenizer.decode(prefix)[-BEFORE_CHARACTERS:]
        change = name_change(before, *(text_after(tokenizer, row["before"], one) for one in (asked, stored)))
        row["change"] = None if change is None else {"code": change.code, "words": change.words, "cure": change.cure}
    return row


def _region(tokenizer: Any, given: Prompt | None, prefix: list[int], common: int) -> str:
    if given is not None:
        return region(tokenizer, given, common)
    return region_of_text(tokenizer, tokenizer.decode(prefix)) if len(prefix) == common else ""


def _ids(packed: str) -> list[int]:
    """Token ids of packed bytes in hex."""
    return unpack_tokens(bytes.fromhex(packed))


def _title(row: dict[str, Any]) -> str:
    shares = f"{row['common_tokens']:,} of {row['prompt_tokens']:,} tokens are stored"
    if row["cause"] == Cause.WHOLE:
        is_last_left = row["common_tokens"] == row["prompt_tokens"] - 1
        shares = f"hit, {shares}" + (" (an engine computes the last one)" if is_last_left else "")
    named = row["alias"] or row["namespace_id"][:12]
    if not row["request_id"] and not row["pid"]:
        return f"{named}: {shares}"
    age = span_text(int(time.time() - row["at_ms"] / 1000))
    return f"{named}: {shares}  [{row['request_id'] or '-'}] {age} ago"


def _facts(row: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [] if row["cause"] == Cause.WHOLE else [("cause", _cause(row)), ("offered", _offered(row))]
    if remote := row.get("remote"):
        facts.append(("remote", remote_words_of(remote)))
    if row["region"]:
        facts.append(("where", row["region"]))
    if row["cause"] != Cause.WHOLE:
        for name, tokens in (("before", row["before"]), ("asked", row["asked"]), ("stored", row["stored"])):
            if tokens:
                text = json.dumps(row["text"][name], ensure_ascii=False) if row["text"] else " ".join(map(str, tokens))
                facts.append((name, text))
        if not row["stored"] and row["asked"] and row["common_tokens"]:
            facts.append(("stored", "the stored prompt ends here"))
    change = row["change"]
    if row["cause"] == Cause.CHANGED and row["text"]:
        facts.append(("changed", change["words"] if change else "no pattern that is known: compare asked and stored"))
    cure = change["cure"] if change and row["cause"] == Cause.CHANGED else _CURES.get(row["cause"], "")
    if cure:
        facts.append(("cure", cure))
    if row["store"]:
        facts.append(("its store", _store(row["store"])))
    if row["nearest_key"]:
        facts.append(("nearest", f"kvstore show {row['nearest_key'][:12]}"))
    if row["cause"] not in (Cause.WHOLE, Cause.CHANGED):
        facts.append(("see", SEE))
    return facts


def _cause(row: dict[str, Any]) -> str:
    words = cause_words(row["cause"], row["common_tokens"])
    if row["cause"] == Cause.IDENTITY:
        where = f" ({row['other_alias'] or '-'}, {row['other_namespace_id'][:12]})" if row["other_namespace_id"] else ""
        has = f" has {row['other_tokens']:,} tokens of it" if row["other_tokens"] else ""
        return f"{words}: another {row['identity_field']}{where}{has}"
    if row["unstored_reason"]:
        return f"{words}: {row['unstored_reason']}, {words_of(row['unstored_reason'])}"
    if row["cause"] == Cause.LIMITED:
        return f"{words}: {row['reason']}, {words_of(row['reason'])}"
    return words


def _offered(row: dict[str, Any]) -> str:
    reason = row["reason"]
    why = f", {reason}: {words_of(reason)}" if reason != "ok" else ""
    return f"{row['given_tokens']:,} tokens{why}"


def _store(store: dict[str, Any]) -> str:
    reason = store["reason"]
    held = f"{store['stored_tokens']:,} of {store['offered_tokens']:,} tokens, {size_text(store['new_bytes'])} new"
    return f"{held}, {reason}: {words_of(reason)}" if reason not in NOT_NEEDED else held
