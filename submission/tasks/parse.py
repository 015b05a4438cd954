"""A task's TOML to a Task, or to one line that names the line in it that makes no sense."""

import difflib
import itertools
import re
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submission.errors import BankoError, UsageError
from submission.tasks.task import Task, TaskClass

MAX_BYTES = 4 * 2**20  # a thousand classes take about 150 kB: anything this large is another kind of file

# Rules: each looks at one value and returns what it must be, or None where it is that.


def _is_number(value: object) -> bool:
    # TOML has NaN and infinities, and whole numbers without end.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _text(value: object) -> str | None:
    # Joiners of no width are how some languages, and pictures, are spelt.
    seen = re.sub("[\u200c\u200d]", "", value) if isinstance(value, str) else ""
    if seen.strip() and seen.isprintable():
        return None
    return "must be a string of one line, not empty"


def check_file_name(value: object) -> str | None:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        return None
    return "must suit as a file name: 1 to 64 letters, digits, '_', '-' or '.', a letter or digit first"


def _whole_number(low: int, high: int | None = None) -> Callable[[object], str | None]:
    def rule(value: object) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= (value if high is None else high):
            return None
        return f"must be a whole number, {low} or more" if high is None else f"must be a whole number, {low} to {high}"

    return rule


def check_size(value: object) -> str | None:
    out_of_range = _whole_number(8, 1024)(value)
    is_odd = isinstance(value, int) and value % 2 == 1
    return "must be an even whole number of pixels, 8 to 1024" if out_of_range or is_odd else None


def _three_numbers(what: str, fits: Callable[[float], bool]) -> Callable[[object], str | None]:
    def rule(value: object) -> str | None:
        if isinstance(value, list) and len(value) == 3 and all(_is_number(v) and fits(v) for v in value):
            return None
        return f"must be three numbers {what}, one per channel (of pixels in 0..1, not 0..255)"

    return rule


def _classes(value: object) -> str | None:
    if isinstance(value, list) and len(value) >= 2 and all(isinstance(v, dict) for v in value):
        return None
    return "must be a list of two or more tables, { index = 0, name = ... } or [[classes]]"


def _phrasings(value: object) -> str | None:
    return None if isinstance(value, dict) else "must be a table of lists, one a kind"


def _templates(value: object) -> str | None:
    if isinstance(value, list) and value and all(_text(v) is None and v.count("{}") == 1 for v in value):
        return None
    return "must be a list of strings, each with exactly one {} for the described prompt"


_Rules = Mapping[str, Callable[[object], str | None]]

_TASK_RULES: _Rules = {
    "name": check_file_name,
    "title": _text,
    "size": check_size,
    "mean": _three_numbers("from 0 to 1", lambda v: 0 <= v <= 1),
    "std": _three_numbers("above 0, 0.0001 to 1", lambda v: 1e-4 <= v <= 1),
    "max_ipc": _whole_number(1),
    "classes": _classes,
    "phrasings": _phrasings,
}
_TASK_OPTIONAL = {"title", "phrasings"}
_CLASS_RULES: _Rules = {
    "index": _whole_number(0),
    "name": _text,
    "label": _text,
    "described": _text,
    "kind": _text,
    "wnid": _text,
}
_CLASS_OPTIONAL = {"label", "described", "kind", "wnid"}


def parse_prompts(path: Path, task: Task, tasks: Sequence[Task] = ()) -> dict[str, tuple[str, ...]]:
    """A user's own prompts in a TOML file, `class = ["prompt", ...]`, one or more for every class of the task. It may
    hold those of other `tasks` as well.

    Raises UsageError (`FILE:LINE: what is wrong`).
    """
    source, document = _read_document(path)
    names = {unicodedata.normalize("NFC", c.name): c.name for c in task.classes}
    known = {unicodedata.normalize("NFC", c.name) for one in (task, *tasks) for c in one.classes}
    told: dict[str, str] = {}
    for key, prompts in document.items():
        name, wrong = unicodedata.normalize("NFC", key), None
        if name not in known:
            close = did_you_mean(difflib.get_close_matches(name, known, n=1))
            wrong = f"{task.name} has no class {key!r}{close}"
        elif name in told:
            wrong = f"{key!r} is there twice, in two forms of Unicode that look the same"
        elif not isinstance(prompts, list) or not prompts or any(_text(prompt) for prompt in prompts):
            wrong = f"{key} must be a list of prompts, strings of one line, not empty"
        if wrong:
            raise source.refusal(source.find(key, (0, len(source.text))), wrong)
        told[name] = key
    if missing := [name for name in names if name not in told]:
        raise UsageError(f"{path}: no prompts for {len(missing)} classes of {task.name}, the first is {missing[0]!r}")
    return {own: tuple(document[told[name]]) for name, own in names.items()}


def parse_task(path: Path) -> Task:
    """The task in a TOML file. Raises UsageError (`FILE:LINE: what is wrong`)."""
    source, document = _read_document(path)
    text = source.text
    whole = (0, len(text))
    _check(source, document, whole, _TASK_RULES, _TASK_OPTIONAL)
    tables: list[dict[str, Any]] = document["classes"]
    spans = source.class_spans(len(tables))
    for table, span in zip(tables, spans, strict=True):
        _check(source, table, span, _CLASS_RULES, _CLASS_OPTIONAL)

    phrasings: dict[str, list[str]] = document.get("phrasings", {})
    first_kind = next(iter(phrasings), "")
    in_phrasings = (source.find("phrasings", whole), len(text))
    for kind, templates in phrasings.items():
        if complaint := _templates(templates):
            raise source.refusal(source.find(kind, in_phrasings), f"phrasings {kind!r} {complaint}")
        if len(templates) != len(phrasings[first_kind]):
            raise source.refusal(
                source.find(kind, in_phrasings),
                f"phrasings {kind!r} has {len(templates)} templates where {first_kind!r} has "
                f"{len(phrasings[first_kind])}: all kinds need the same number",
            )

    classes = [_task_class(table) for table in tables]
    for key in ("index", "name", "described"):
        seen: dict[object, int] = {}
        for c, (start, _) in zip(classes, spans, strict=True):
            value = getattr(c, key)
            value = unicodedata.normalize("NFC", value) if isinstance(value, str) else value
            same = value.lower() if key == "described" else value  # text encoders read small letters
            if same in seen:
                first = source.line(seen[same])
                raise source.refusal(start, f"class {key} {value!r} is used twice (first on line {first})")
            seen[same] = start
    in_order = sorted(zip(classes, spans, strict=True), key=lambda pair: pair[0].index)
    for expected, (c, (start, _)) in enumerate(in_order):
        if c.index != expected:
            raise source.refusal(
                start, f"class index {expected} is missing (the next one there is, {c.index}, is here)"
            )
        if c.kind is not None and c.kind not in phrasings:
            raise source.refusal(
                start, f"class {c.name!r} is of kind {c.kind!r}, and [phrasings] has no list of that name"
            )

    return Task(
        name=document["name"],
        title=document.get("title", document["name"]),
        size=document["size"],
        mean=_three_floats(document["mean"]),
        std=_three_floats(document["std"]),
        max_ipc=document["max_ipc"],
        classes=tuple(c for c, _ in in_order),
        phrasings={kind: tuple(templates) for kind, templates in phrasings.items()},
    )


def _read_document(path: Path) -> tuple["_Source", dict[str, Any]]:
    """A TOML file, as text and as what it says. Raises UsageError."""
    try:
        text = read_text(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise UsageError(f"{path}:1: not a task file: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and what int() says to a number of thousands of digits
        raise UsageError(f"{path}:{_syntax_error_line(str(error), text)}: not valid TOML: {error}") from error
    return _Source(path, text, _without_strings(text)), document


def _task_class(table: Mapping[str, Any]) -> TaskClass:
    label = table.get("label", table["name"].replace("_", " "))
    described = table.get("described", default_prompt(label))
    return TaskClass(table["index"], table["name"], label, described, table.get("kind"), table.get("wnid"))


def default_prompt(name: str) -> str:
    """What the model is asked for where a task's file says no more than a name."""
    label = name.replace("_", " ")
    return f"a photo of {'an' if label[0] in 'aeiouAEIOU' else 'a'} {label}"


def _three_floats(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def read_text(path: Path, refusal: type[BankoError] = UsageError) -> str:
    """A file of UTF-8 text, of at most `MAX_BYTES`, without a byte order mark. Raises the refusal, or OSError."""
    if not path.is_file():  # a pipe or a device would never end
        raise refusal(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise refusal(f"{path}: {size / 2**20:.2f} MiB is too much, {MAX_BYTES >> 20} MiB are the most")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors put a byte order mark first, and TOML allows none
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\n|\r", data[: error.start])) + 1
        raise refusal(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def _check(
    source: "_Source", table: Mapping[str, Any], span: tuple[int, int], rules: _Rules, optional: set[str]
) -> None:
    """Unknown keys, missing keys, and each value by its rule."""
    for key in table:
        if key not in rules:
            close = difflib.get_close_matches(key, rules, n=1)
            raise source.refusal(source.find(key, span), f"unknown key {key!r}{did_you_mean(close)}")
    for key in rules:
        if key not in table and key not in optional:
            where = "this class" if rules is _CLASS_RULES else "the task (its keys stand above the first [table])"
            raise source.refusal(span[0], f"key {key!r} is missing from {where}")
    for key, value in table.items():
        if complaint := rules[key](value):
            raise source.refusal(source.find(key, span), f"{key} {complaint}")


def did_you_mean(close: list[str]) -> str:
    return f" (did you mean {close[0]!r}?)" if close else ""


# Where things stand in the file. tomllib gives a line for a syntax error only; for what parses but makes no sense,
# the text is searched again. It is known to be valid TOML by then, so the search may be simple.

_STRINGS_AND_COMMENTS = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|#[^\n]*", re.DOTALL
)


def _without_strings(text: str) -> str:
    """The same text with every string and comment blanked out; length and line ends stay."""
    return _STRINGS_AND_COMMENTS.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def _syntax_error_line(message: str, text: str) -> int:
    found = re.search(r"at line (\d+)", message)
    return int(found[1]) if found else text.rstrip().count("\n") + 1  # "at end of document"


@dataclass(frozen=True)
class _Source:
    path: Path
    text: str
    code: str  # the text without strings and comments

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def refusal(self, position: int, what: str) -> UsageError:
        return UsageError(f"{self.path}:{self.line(position)}: {what}")

    def find(self, key: str, span: tuple[int, int]) -> int:
        """Where a line of the span assigns to the key or has it as its table's name; else the start of the span."""
        name = rf"[\"']?{re.escape(key)}[\"']?[ \t]*"
        for found in re.finditer(rf"^[ \t]*(?:[\w-]+\.)?{name}=|^[ \t]*\[+[ \t]*{name}\]+", self.text, re.MULTILINE):
            if span[0] <= found.start() < span[1] and self.code[found.end() - 1] in "=]":
                return found.start()
        return span[0]

    def class_spans(self, count: int) -> list[tuple[int, int]]:
        """Start and end of each class in the text, in the order of the file."""
        heads = [found.start() for found in re.finditer(r"^[ \t]*\[", self.code, re.MULTILINE)]
        array_of_tables = re.compile(r"[ \t]*\[\[[ \t]*[\"']?classes[\"']?[ \t]*\]\]")
        tables = itertools.pairwise([*heads, len(self.code)])
        spans = [(head, end) for head, end in tables if array_of_tables.match(self.text, head)]
        if not spans:
            # classes = [ {...}, {...} ]. No key of a class takes a table: where one is nested all the same, its own
            # class is refused before the count goes wrong for those after it.
            start = self.find("classes", (0, len(self.text)))
            braces = (found.start() for found in re.finditer(r"\{", self.code[start:]))
            spans = [(start + brace, self.code.find("}", start + brace)) for brace in braces][:count]
        return spans if len(spans) == count else [(0, 0)] * count  # spelt in a way not foreseen: line 1
