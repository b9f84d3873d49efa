"""What is in an input: rows, bad rows, ids that come twice, text to be sent. One pass, eight bytes for each id.

Ids are kept as hashes in 256 arrays by their lowest byte, so that looking for equal ones takes the memory of one
256th of them at a time. Which ids they are, a second pass tells, and only when there are any.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from batchstream.records import InvalidRow

if TYPE_CHECKING:
    from batchstream.files.source import Source

BAD_SHOWN = 20
IDS_SHOWN = 3
MODELS_SHOWN = 20
CHARACTERS_PER_TOKEN = 4
"""A rule of thumb for English text and today's tokenizers; other languages and code take more tokens."""

_TEXTS = ("messages", "prompt", "input", "system", "instructions")
_NO_TEXT = frozenset({"role", "type", "image_url", "input_audio", "file", "source"})
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class Survey:
    """`rows` = `valid` + `invalid`; `bad`: the first invalid ones; `characters` of all prompts; `answer_tokens`: sum of
    the rows' own limits on their answers, over the `limited` rows that have one; `models`: rows by model, of the
    first few models; `duplicates`: rows whose id stood in an earlier row."""

    def __init__(self) -> None:
        self.rows = self.valid = self.invalid = 0
        self.bad: list[InvalidRow] = []
        self.characters = 0
        self.answer_tokens = self.limited = 0
        self.without_model = 0
        self.models: Counter[str] = Counter()
        self.duplicates = 0
        self.duplicate_ids: list[str] = []

    @property
    def tokens(self) -> int:
        """Prompt tokens, roughly."""
        return self.characters // CHARACTERS_PER_TOKEN

    def _take(self, body: dict[str, Any]) -> None:
        self.valid += 1
        self.characters += sum(_characters(body[name]) for name in _TEXTS if name in body)
        limit = next((body[name] for name in _LIMITS if isinstance(body.get(name), int)), None)
        if limit is not None:
            self.limited += 1
            self.answer_tokens += limit * (body["n"] if isinstance(body.get("n"), int) else 1)
        model = body.get("model")
        if not isinstance(model, str):
            self.without_model += 1
        elif model in self.models or len(self.models) < MODELS_SHOWN:
            self.models[model] += 1


def survey(source: Source) -> Survey:
    """Read `source` to its end. Raises InputError for what no row can be made of."""
    found = Survey()
    hashes = [array("q") for _ in range(256)]
    for batch in source.batches():
        for row in batch:
            found.rows += 1
            if isinstance(row, InvalidRow):
                found.invalid += 1
                if len(found.bad) < BAD_SHOWN:
                    found.bad.append(row)
                continue
            found._take(row.body)
            if row.id != str(row.row):
                value = hash(row.id)
                hashes[value & 255].append(value)
    twice = set(_repeated(hashes, found))
    if twice:
        found.duplicate_ids = list(_named(source, twice))
    return found


def _repeated(hashes: Iterable[array[int]], found: Survey) -> Iterator[int]:
    """The first few hashes that come more than once; counts all of them."""
    shown = 0
    for values in hashes:
        extra = len(values) - len(set(values))
        found.duplicates += extra
        if extra and shown < IDS_SHOWN:
            for value, count in Counter(values).items():
                if count > 1 and shown < IDS_SHOWN:
                    shown += 1
                    yield value


def _named(source: Source, hashes: set[int]) -> Iterator[str]:
    """The ids with these hashes, each once, with the rows that first have them."""
    first: dict[int, int] = {}
    for batch in source.batches():
        for row in batch:
            value = hash(row.id)
            if value not in hashes:
                continue
            if value in first:
                yield f"{row.id!r} (rows {first[value]} and {row.row})"
                hashes.remove(value)
                if not hashes:
                    return
            else:
                first[value] = row.row


def _characters(value: Any) -> int:
    """Characters of text in a prompt; images and other files are not text."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_characters, value))
    if isinstance(value, dict):
        return sum(_characters(part) for name, part in value.items() if name not in _NO_TEXT)
    return 0
