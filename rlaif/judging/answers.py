"""What a judge's server answered, read: a reply, why it is none, what it cost, and how long to wait. Pure.

In: the content and headers of an answer, in the forms of many servers. Out: a `Reply` that the server finished, or a
`NoReply`, which says whether another attempt may get one. Nothing that went wrong becomes a reply: an error under
HTTP 200, an unknown finish reason and an answer without text are failures.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from datetime import datetime
from typing import Any, Literal

from rlaif.judging.parsing import Reply, ReplyToken, ending
from rlaif.records import Usage

_RETRIED = (408, 409, 425, 429, 498)
_NOT_NOW = re.compile(r"rate.?limit|overload|too many|capacity|quota|exhausted|unavailable|timed? ?out|try again", re.I)
# What an error's own words or numbers say, as the HTTP status that others would have answered with.
_STATUS_WORDS = tuple(
    (status, re.compile(words, re.I))
    for status, words in (
        (401, r"api.?key|unauthori[sz]ed|unauthenticated|authentication|not.?authori[sz]ed"),
        (403, r"permission|forbidden|access.?denied"),
        (404, r"not.?found|(?:no.?such|unknown).?model"),
        (402, r"insufficient.?(?:balance|credit|funds)|payment.?required"),
        (429, r"rate.?limit|too.?many|exhausted|insufficient.?quota|overload"),
        (
            400,
            r"context.?length|content.?filter|(?:invalid|bad).?(?:request|argument|param)|unsupported|unprocessable"
            r"|validation",
        ),
    )
)
_STATUS_SAID = tuple(
    (status, re.compile(words, re.I))
    for status, words in (
        (401, r"\b(?:invalid|incorrect|missing|wrong|no|bad|expired)\s(?:\w+\s)?api[\s_-]?key|unauthori[sz]ed"),
        (
            404,
            r"\bmodel\b.{0,80}\b(?:not found|(?:does not|doesn['’]t|not) exist)|(?:no such|unknown) model",
        ),
    )
)
# MiniMax's
_BASE_RESP_KEYS = (("status_code", "statusCode", "StatusCode"), ("status_msg", "statusMsg", "StatusMessage"))
_BASE_RESP = {"1002": 429, "1004": 401, "1008": 402, "1026": 400, "1027": 400, "2013": 400, "2049": 401}
_FAILED_STATES = ("error", "failed", "failure", "fail")
# A verdict stands at the end of its reply; what comes before it needs no probabilities.
_TOKENS_KEPT = 16

FailureKind = Literal["down", "broken", "unfinished", "empty", "rejected"]
"""`down`: no answer, or "not now". `broken`: an answer that is none. `unfinished`: a reply that the server didn't
finish. `empty`: a finished reply without a word. `rejected`: the server refuses the request, or can't take it whole."""


class NoReply(Exception):
    """An attempt without a reply; another may get one, unless the request was rejected."""

    def __init__(
        self,
        error: str,
        kind: FailureKind,
        retry_after_s: float | None = None,
        status: int | None = None,
        said: str = "",
    ):
        super().__init__(error)
        self.error = error
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.status = status
        """Of an error under HTTP 200: the status that it stands for, where it says so."""
        self.said = said
        """The error's own sentence."""


def asks_again(status: int) -> bool:
    """Whether another attempt may get a reply."""
    return status in _RETRIED or status >= 500


_UNITS_S = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_NUMBER, _UNIT = (
    r"\d+(?:\.\d*)?|\.\d+",
    (r"milliseconds?|millis|msecs?|ms|us|µs|ns|days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s"),
)
_DURATION = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<unit>{_UNIT})(?![a-zµ])\.?(?:\s*,|\s+and\b)?", re.I)
# What is to be done ("try again in 20s", "retry after 1 h 2 min", "will reset after 1h2m3s"), unless it is what was
# done ("gave up after a wait of 120 seconds", "after retrying for 30 s").
_SAID_TO_WAIT = re.compile(
    r"(?<!\w)(?:try(?:ing)?(?: \w+){0,3} again|retry(?:ing)?|wait|back[ -]?off|(?:will|to) reset|resets"
    r"|available again)"
    r"(?:[\s_:=(~-]+(?:again|after|in|for|at least|about|around|approximately|another|a minimum of|your|this|the"
    r"|requests?|delay|waiting|later))*[\s_:=(~-]+"
    rf"(?P<time>(?:(?:{_NUMBER})\s*(?:{_UNIT})(?![a-zµ])(?:\s*,|\s+and\b)?\s*)+)",
    re.I,
)
_WAS_DONE = re.compile(
    r"\b(?:an?|the|its?|after|of|up|each|every|last|first|no|that|without|our|max|maximum|stopped|while|when|were|was"
    r"|finished|failed to|did not|didn't|could not|couldn't|cannot|can't|not|never|unable to|connection)\s+$",
    re.I,
)


def retry_after_s(headers: Any, body: Any = None) -> float | None:
    """Seconds that a server asks to wait; None when it doesn't say.

    In this order: `retry-after-ms`; `Retry-After` as a number, an HTTP date or a duration; the body's `retryDelay`
    (Google), `retry_after`, `retryAfterMs` and the like, `headers` of the server behind it (OpenRouter) or a sentence
    ("try again in 20s"); when a rate limit that is used up starts again (`x-ratelimit-reset-…`).
    """
    waits = (
        _seconds(headers.get("retry-after-ms"), 1e-3),
        _seconds(headers.get("x-ms-retry-after-ms"), 1e-3),
        _seconds(headers.get("retry-after")),
        _body_wait_s(body),
        *_resets(headers),
    )
    return next((wait for wait in waits if wait is not None), None)


def _seconds(value: Any, unit: float = 1.0) -> float | None:
    """A wait in one of the forms that servers use: a number, `34s`, `1m30s`, `30 seconds`, `{seconds: 34}`, a date."""
    if isinstance(value, dict):
        whole, rest = _seconds(value.get("seconds", 0)), _seconds(value.get("nanos", 0), 1e-9)
        return None if whole is None or rest is None else whole + rest
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        seconds = float(value) * unit
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    text = str(value).strip()
    if _DURATION.search(text) and not _DURATION.sub("", text).strip():
        return _duration_s(text)
    try:
        if re.match(r"\d{4}-\d\d-\d\d", text):
            return max(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() - time.time(), 0.0)
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _duration_s(text: str) -> float:
    """The sum of a duration's parts."""
    return sum(float(part["number"]) * _unit_s(part["unit"].lower()) for part in _DURATION.finditer(text))


def _unit_s(unit: str) -> float:
    return _UNITS_S[unit if unit in _UNITS_S else "ms" if unit.startswith(("mil", "msec")) else unit[0]]


_WAIT_KEY = re.compile(r"retry(?:after|delay|in)(?P<ms>ms|millis|milliseconds)?(?:s|secs|seconds)?")


def _body_wait_s(body: Any) -> float | None:
    """What an error's body asks to wait, however deep it says so."""
    owed = [body]
    texts: list[str] = []
    for node in owed:  # grows on its way
        if len(owed) > 200:
            break
        if isinstance(node, list):
            owed += node
        elif isinstance(node, dict):
            for key, value in node.items():
                name = re.sub("[-_ ]", "", str(key).lower())
                if (asked := _WAIT_KEY.fullmatch(name)) and (
                    wait := _seconds(value, 1e-3 if asked["ms"] else 1.0)
                ) is not None:
                    return wait
                if name == "headers" and isinstance(value, dict):  # of the server behind this one
                    first = {str(k).lower(): v[0] if isinstance(v, list) and v else v for k, v in value.items()}
                    if (wait := retry_after_s(first)) is not None:
                        return wait
                if not isinstance(value, str):
                    owed.append(value)
                elif value.lstrip()[:1] in ("{", "[") and (inner := tree_of(value.encode(errors="replace"))):
                    owed.append(inner)  # what the server behind this one said
                else:
                    texts.append(value)
    for text in texts:
        for found in _SAID_TO_WAIT.finditer(text[:2000]):
            if not _WAS_DONE.search(text[: found.start()]):
                return _duration_s(found["time"])
    return None


def _resets(headers: Any) -> list[float]:
    """When a limit that is used up starts again: the longest of them."""
    found = []
    for name in headers:
        left = str(name).lower()
        if "ratelimit" not in left.replace("-", "") or "reset" not in left:
            continue
        if str(headers.get(left.replace("reset", "remaining"), "0")).strip() not in ("0", "0.0"):
            continue
        value = str(headers[name]).strip()
        if re.fullmatch(r"\d{10}(?:\.\d+)?|\d{13}", value):  # a time of day, in seconds or milliseconds
            found.append(max(float(value) / (1000 if len(value) == 13 else 1) - time.time(), 0.0))
        elif (wait := _seconds(value)) is not None:
            found.append(wait)
    return sorted(found, reverse=True)[:1]


def read_reply(content: bytes, model: str, scrub: Any = str) -> Reply:
    """A server's answer as a `Reply`. What a verdict needs must be there; the rest may be missing or odd.

    Raises:
        NoReply: it holds no reply, or none that the server finished.
    """
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise NoReply(scrub(f"not JSON: {content[:80].decode(errors='replace')!r}"), "broken") from None
    if isinstance(tree, list) and tree:  # Google's errors
        tree = tree[0]
    tree = tree if isinstance(tree, dict) else {}
    choices = tree.get("choices")
    choice = _first(choices) if isinstance(choices, list) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    for place in (tree, choice, message):
        if not isinstance(place, dict):
            continue
        if error := _error_in(place):
            raise _said_instead(place | {"error": error}, scrub)
    if not isinstance(choice, dict) or not isinstance(message, dict):
        if message_in(tree) or tree.get("code"):
            raise _said_instead({"error": tree}, scrub)
        raise NoReply("an answer without a choice", "broken")
    for name in ("finish_reason", "native_finish_reason"):
        if (why := choice.get(name)) is not None:
            if not isinstance(why, str):
                said_so = json.dumps(why, default=str)[:80]
                raise NoReply(scrub(f"a reply whose {name} is no word ({said_so})"), "unfinished")
            break
    said, refusal = _said(message.get("content"))
    reply = Reply(
        content=said,
        refusal=_text(message.get("refusal")) or refusal,
        finish_reason=_finish_reason(choice),
        tokens=_reply_tokens(choice.get("logprobs")),
        usage=_usage(tree.get("usage")),
        model=_text(tree.get("model")) or model,
        system_fingerprint=_text(tree.get("system_fingerprint")),
    )
    if reply.ending == "failed" or (reply.ending == "unsaid" and not (said or reply.refusal)):
        why = f"finish_reason `{reply.finish_reason}`" if reply.finish_reason else "no content, no finish_reason"
        raise NoReply(scrub(f"a reply that the server didn't finish ({why})"), "unfinished")
    return reply


def _finish_reason(choice: dict[str, Any]) -> str | None:
    """How a reply ended, as the server says it, or the server behind it where that one says that it is cut off."""
    said, native = (_text(choice.get(name)) for name in ("finish_reason", "native_finish_reason"))
    if native is not None and ending(said) == "finished" and ending(native) in ("cut_off", "refused"):
        return native
    if native is not None and native.lower().endswith("error"):
        return native
    return said or native


def _first(choices: list[Any]) -> Any:
    """The choice of the lowest index, wherever it stands."""
    if len(choices) < 2:
        return choices[0] if choices else None
    at = [c.get("index") if isinstance(c, dict) else None for c in choices]
    return min(zip(at, choices, strict=True), key=lambda c: c[0] if isinstance(c[0], int) else math.inf)[1]


def _said(content: Any) -> tuple[str | None, str | None]:
    """The text of a message's content, which some servers give in parts, and its refusal; parts that are thoughts are
    neither.

    Raises:
        NoReply: it is no text.
    """
    if content is None or isinstance(content, str):
        return (None if content is None else clean(content)), None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise NoReply("an answer whose content is not text", "broken")
    texts, refusals = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("thought") is not True:
            kind, text = str(part.get("type") or "text"), part.get("text")
            text = text.get("value") if isinstance(text, dict) else text
            if kind in ("text", "output_text") and isinstance(text, str):
                texts.append(text)
            elif kind == "refusal":
                refusals.append(str(part.get("refusal") or text or ""))
    return clean("".join(texts)), clean("".join(refusals)) or None


def _error_in(place: dict[str, Any]) -> Any:
    """What a part of an answer says went wrong, whatever it calls it; nothing when all is well."""
    if place.get("error"):
        return place["error"]
    if isinstance(errors := place.get("errors"), list) and errors:
        return errors[0]
    for name in ("base_resp", "baseResp", "BaseResp"):
        if isinstance(base := place.get(name), dict):
            code, said = (next((base[key] for key in keys if key in base), None) for keys in _BASE_RESP_KEYS)
            if not _is_fine(code):
                return {"code": code, "message": said, "stands_for": _BASE_RESP.get(str(code).strip())}
    state = place.get("status")
    failed = (
        place.get("object") == "error"
        or place.get("type") == "error"
        or place.get("success") is False
        or (isinstance(state, str) and state.lower() in _FAILED_STATES)
        or not _is_fine(place.get("error_code"))
        or _http_status(place.get("code")) is not None
    )
    if not failed:
        return None
    said = message_in(place) or place.get("error_msg") or place.get("error_message") or place.get("msg")
    code = place.get("error_code") or place.get("code") or place.get("status")
    return {"code": code, "type": place.get("type"), "message": said}


def _is_fine(code: Any) -> bool:
    return str(code).strip().lower() in ("0", "200", "none", "", "ok", "success")


def _http_status(code: Any) -> int | None:
    """A code that is an HTTP status of an error."""
    number = int(code) if isinstance(code, int) or (isinstance(code, str) and code.strip().isdecimal()) else 0
    return number if 400 <= number < 600 else None


def _stands_for(error: Any, said: str) -> int | None:
    """The HTTP status that an error stands for: by its numbers, by the names of its kind, by what it says."""
    if isinstance(error, dict):
        named = [error.get(name) for name in ("code", "status", "status_code", "http_code", "type")]
        for code in (error.get("stands_for"), *named):
            if (status := _http_status(code)) is not None:
                return status
        words = " ".join(str(name) for name in named if isinstance(name, str))
        if found := next((status for status, form in _STATUS_WORDS if form.search(words)), None):
            return found
    return next((status for status, form in _STATUS_SAID if form.search(said[:2000])), None)


def _said_instead(place: dict[str, Any], scrub: Any) -> NoReply:
    """An error where a reply should be, under HTTP 200: what its code says holds as if it were the status."""
    error = place["error"]
    said = message_in({"error": error}) or json.dumps(error, default=str)
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    status = _stands_for(error, said)
    rejected = status is not None and status < 500 and not asks_again(status) and status != 402
    if rejected and status not in (401, 404) and _NOT_NOW.search(said):
        rejected, status = False, None
    named = f" {code}" if isinstance(code, int | str) else ""
    return NoReply(
        scrub(f"an error{named} instead of a reply: {said}"),
        "rejected" if rejected else "down",
        _body_wait_s(place),
        status,
        scrub(said),
    )


def read_usage(content: bytes) -> Usage:
    """What an answer says that it cost, whatever else it holds."""
    try:
        return _usage(json.loads(content)["usage"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return Usage()


def _reply_tokens(logprobs: Any) -> tuple[ReplyToken, ...]:
    try:
        return tuple(
            ReplyToken.model_validate(
                {
                    "token": clean(at["token"]),
                    "top": [
                        {"token": clean(t["token"]), "logprob": t["logprob"]} for t in at.get("top_logprobs") or ()
                    ],
                }
            )
            for at in logprobs["content"][-_TOKENS_KEPT:]
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        return ()


_PLAIN_USAGE = {"prompt_tokens", "completion_tokens", "total_tokens"}


def _usage(tree: Any) -> Usage:
    """What an answer cost, in the words of several servers. Thoughts count as completion, cached tokens as prompt."""
    if not isinstance(tree, dict):
        return Usage()
    try:
        native = "prompt_tokens" not in tree and "input_tokens" in tree
        completion = _count(tree.get("completion_tokens") or tree.get("output_tokens") or 0)
        if not native and "prompt_tokens" not in tree:  # all that is known is the sum
            return Usage(prompt_tokens=max(_count(tree["total_tokens"]) - completion, 0), completion_tokens=completion)
        prompt = _count(tree["input_tokens" if native else "prompt_tokens"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return Usage()
    total = _detail(tree, "total_tokens")
    if tree.keys() <= _PLAIN_USAGE and total in (0, prompt + completion):  # the plain form, without the rest's time
        return Usage(prompt_tokens=prompt, completion_tokens=completion)
    thought = _detail(tree, "reasoning_tokens", "thoughts_token_count", details=("completion", "output"))
    cached = _detail(
        tree, "cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens", details=("prompt", "input")
    )
    beside = total - prompt - completion
    # Anthropic's own count leaves the cached ones out of the prompt's.
    written = _detail(tree, "cache_creation_input_tokens")
    outside = _detail(tree, "cache_read_input_tokens") + written
    if outside and (native or cached > prompt or beside == outside):
        prompt, beside = prompt + outside, beside - outside
    if beside > 0:  # thoughts are counted in the total alone
        completion, thought = completion + beside, max(thought, beside)
    elif thought > completion:  # and here not even there
        completion += thought
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=min(cached, prompt),
        reasoning_tokens=min(thought, completion),
    )


def _detail(tree: dict[str, Any], *names: str, details: tuple[str, ...] = ()) -> int:
    """The first of some counts that is there, in a usage or in its details."""
    for place in (tree, *(tree.get(f"{d}_tokens_details") for d in details)):
        if not isinstance(place, dict):
            continue
        for name in names:
            if value := place.get(name):
                try:
                    if found := _count(value):
                        return found
                except (TypeError, ValueError, OverflowError):
                    continue
    return 0


def _count(value: Any) -> int:
    return max(math.ceil(float(value)), 0)


def _text(value: Any) -> str | None:
    return clean(value) if isinstance(value, str) and value else None


def clean(text: str) -> str:
    """Without lone surrogates, which JSON can hold and no file can."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def tree_of(content: bytes) -> Any:
    """An answer's JSON; None when it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def message_in(body: Any) -> str | None:
    """The sentence in an error's body, in the forms that servers use."""
    if isinstance(body, list) and body:
        body = body[0]
    if isinstance(body, dict):
        inner = body.get("error")
        if isinstance(inner, dict):
            return _text(inner.get("message"))
        return _text(body.get("message")) or _text(inner) or _text(body.get("detail"))
    return _text(body)
