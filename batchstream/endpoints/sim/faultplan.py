"""What goes wrong, and when: the grammar of `--fault` and the decision for one attempt.

    FAULT  = KIND [ "(" OPTION "," ... ")" ] WHEN
    WHEN   = "=" P          with probability P, drawn from (seed, request body, attempt)
           | "@" N          for the N-th request the server receives (1 = the first)
           | "@" N ".." M   for the N-th to the M-th
           | "~" TEXT       for every request whose body contains TEXT (as it stands in the JSON)
    KIND   = a status 400..599, or one of

    before the answer
      reset-early    the connection is reset before any byte
      slow-headers   s=5: nothing for s seconds, then the answer
      html           status 200, a web page
      json-error     status 200, a JSON error body
      redirect       status 302 to another path of this server
      whole          status 200, the JSON answer although a stream was asked
    inside the answer, after k steps of generated output (k=N; default: drawn)
      reset          the connection is reset
      close          the socket closes, the chunked body incomplete
      truncate       the body ends cleanly, without the end of the answer
      truncate-event ... in the middle of an event
      truncate-utf8  ... in the middle of a character
      length         the head announced a longer body than comes before the socket closes
      stall          nothing more comes, the connection stays open
      comments       every=1: only keep-alive comments come, for ever
      error          status=500: an error event, then a clean end
      garbage        an event that is no JSON, then the rest
    all the way
      drip           every=0: one byte at a time, every so many seconds

    OPTION: k, s, every, status as above; times=N only for the first N attempts of a body; and for statuses
            retry-after=S, retry-after-ms=MS, retry-date=S (a date S seconds ahead), code=…, type=…, message=…

Examples: `429=0.05`  `429(retry-after=2)=0.05`  `500@17`  `truncate(k=3,times=1)=1`  `stall~poison`.
Faults with `@` and `~` are looked at first, in their order; one draw then decides among the probabilities,
whose sum may not pass 1. Requests without a stream get the nearest thing: a cut body, a status.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec

from batchstream.errors import UsageError

EARLY = ("reset-early", "slow-headers", "html", "json-error", "redirect", "whole")
WITHIN = (
    "reset", "close", "truncate", "truncate-event", "truncate-utf8", "length", "stall", "comments", "error", "garbage",
)  # fmt: skip
KINDS = (*EARLY, *WITHIN, "drip")
_NUMBERS = {
    "k": 0,
    "s": 0,
    "every": 0,
    "status": 400,
    "times": 1,
    "retry-after": 0,
    "retry-after-ms": 0,
    "retry-date": None,
}
_TEXTS = ("code", "type", "message")
_FORM = re.compile(r"([a-z0-9-]+)(?:\(([^)]*)\))?(=|@|~)(.+)", re.DOTALL)


class Fault(msgspec.Struct, frozen=True):
    """One fault of the grammar. `status` is set when the kind is a status; `probability`, `requests`
    (first and last ordinal) and `text` say when, exactly one of them."""

    spelling: str
    kind: str
    status: int | None = None
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    probability: float | None = None
    requests: tuple[int, int] | None = None
    text: bytes | None = None

    @property
    def times(self) -> float:
        """Attempts of one body, from the first, that it may hit."""
        return self.numbers.get("times", math.inf)

    @property
    def label(self) -> str:
        """The fault without its WHEN: what the ledger notes."""
        return self.spelling[: _FORM.fullmatch(self.spelling).start(3)]  # type: ignore[union-attr]


class FaultPlan(msgspec.Struct, frozen=True):
    """All faults of a server; `choose` is a pure function of its arguments."""

    scripted: tuple[Fault, ...] = ()
    random: tuple[Fault, ...] = ()

    def choose(self, ordinal: int, body: bytes, attempt: int, draw: float) -> Fault | None:
        """The fault of one request: `ordinal` and `attempt` count from 1, `draw` is uniform in [0, 1)."""
        for fault in self.scripted:
            if attempt > fault.times:
                continue
            if fault.requests is not None and fault.requests[0] <= ordinal <= fault.requests[1]:
                return fault
            if fault.text is not None and fault.text in body:
                return fault
        for fault in self.random:
            assert fault.probability is not None  # noqa: S101  (told to the type checker)
            if draw < fault.probability:
                # Past its times a fault becomes no fault: it must not hand its share to another one.
                return fault if attempt <= fault.times else None
            draw -= fault.probability
        return None


def parse_faults(spellings: Sequence[str]) -> FaultPlan:
    """Read the grammar above. Raises `UsageError` naming the fault, what was expected and what came."""
    faults = [_parse(spelling) for spelling in spellings]
    total = sum(fault.probability or 0.0 for fault in faults)
    if total > 1 + 1e-9:
        raise UsageError(f"fault: the probabilities add up to {total:g}; they may not pass 1")
    return FaultPlan(
        tuple(fault for fault in faults if fault.probability is None),
        tuple(fault for fault in faults if fault.probability is not None),
    )


def _parse(spelling: str) -> Fault:
    match = _FORM.fullmatch(spelling.strip())
    if match is None:
        raise UsageError(
            f"fault: expected KIND=P, KIND@N or KIND~TEXT, as 429=0.05, 500@17 or stall(k=3)~poison, got {spelling!r}"
        )
    kind, options, sign, when = match.groups()
    status = int(kind) if kind.isdigit() else None
    if kind not in KINDS and not (status is not None and 400 <= status <= 599):
        raise UsageError(
            f"fault {spelling!r}: unknown kind {kind!r}; expected a status 400..599 or one of {', '.join(KINDS)}"
        )
    numbers, texts = _options(spelling, options or "")
    fault = Fault(spelling.strip(), kind, status, numbers, texts)
    if sign == "~":
        return msgspec.structs.replace(fault, text=when.encode())
    if sign == "=":
        return msgspec.structs.replace(fault, probability=_probability(spelling, when))
    bounds = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", when)
    first, last = (int(bounds[1]), int(bounds[2] or bounds[1])) if bounds else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"fault {spelling!r}: expected a request number from 1 as 17 or 3..9, got {when!r}")
    return msgspec.structs.replace(fault, requests=(first, last))


def _options(spelling: str, text: str) -> tuple[dict[str, float], dict[str, str]]:
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for option in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = option.partition("=")
        if name in _TEXTS:
            texts[name] = value
            continue
        if name not in _NUMBERS:
            known = ", ".join((*_NUMBERS, *_TEXTS))
            raise UsageError(f"fault {spelling!r}: unknown option {name!r}; options are {known}")
        number, least = _number(value), _NUMBERS[name]
        if number is None or (least is not None and number < least):
            bound = "" if least is None else f" of at least {least}"
            raise UsageError(f"fault {spelling!r}: {name}: expected a number{bound}, got {value!r}")
        numbers[name] = number
    return numbers, texts


def _probability(spelling: str, text: str) -> float:
    number = _number(text)
    if number is None or not 0 <= number <= 1:
        raise UsageError(f"fault {spelling!r}: expected a probability between 0 and 1, got {text!r}")
    return number


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
