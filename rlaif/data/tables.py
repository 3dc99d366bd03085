"""Tables as other people have them: JSON, JSONL, CSV, TSV and Parquet files, packed or not, as rows.

In: a file. Out: its rows, each with its place for error messages: `read_rows` gives them as they stand, `read_table` as
rows of named columns. A JSON file is a list of objects, an object of lists (a list for each column), an object whose
one list of objects is the table, or lines of objects under the wrong ending. A field within a column has a path:
`results.0.winner`, and with `*` all of a list.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlaif.errors import UserError, cant_read, first_line

_UNPACK: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
)
_PACKED = (".gz", ".bz2", ".xz")
_REFUSED = ((b"PK\x03\x04", "a zip file"), (b"\x28\xb5\x2f\xfd", "packed with zstd"), (b"PAR1", "a Parquet file"))
_ALL = "*"


Placed = tuple[str, Any]
"""Where a row was found, as errors name it (`file:line`), and its value."""


class Row(NamedTuple):
    """One row of a table."""

    where: str
    """File and line, for errors."""
    number: int
    """From 0."""
    values: Mapping[str, Any]


def read_rows(path: Path, hint: str = "") -> list[Placed]:
    """The rows of a JSON, JSONL, CSV, TSV or Parquet file, whatever they are; a cell that a CSV row lacks is None.

    Args:
        path: its ending says what it is.
        hint: what a row looks like, for the end of an error message.

    Raises:
        UserError: the file can't be read, or a line isn't a row.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    return _text_rows(path, read_text(path), hint)


def read_table(path: Path, bare: str | None = None) -> list[Row]:
    """The rows of a JSON, JSONL, CSV or TSV file. Half a surrogate pair, which no other file can hold, is replaced.
    Where the rows of a JSON file are plain values, `bare` is the column that they are of. Blank rows of a CSV file, as
    spreadsheets end a table, are left out.

    Raises:
        UserError: the file can't be read, or a row isn't one (with its line).
    """
    text = read_text(path)
    delimiter = _delimiter(path)
    if delimiter is not None:
        _check_head(path, _head(text, delimiter))
    found = _text_rows(path, text)
    if len(found) == 1 and _is_columns(found[0][1]):  # an object of lists, written as one line
        found = _of_value(path, found[0][1])
    rows = []
    for number, (where, value) in enumerate(found):
        if bare is not None and not isinstance(value, dict | list):
            value = {bare: value}
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {type(value).__name__}; a row has named columns")
        if delimiter is not None:
            if not any((cell or "").strip() for cell in value.values()):
                continue
            if None in value.values():
                raise UserError(f"{where}: the row has another number of columns than the first line")
        rows.append(Row(where, number, value))
    escaped = "\\ud" in text.lower()
    return [row._replace(values=_whole(row.values)) for row in rows] if escaped else rows


def read_text(path: Path) -> str:
    """The text of a file, unpacked where it is packed, whatever it is called.

    Raises:
        UserError: it can't be read, is damaged, or isn't UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise cant_read(path, "the file", e) from e
    for magic, name, unpack in _UNPACK:
        if content.startswith(magic):
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
                raise UserError(
                    f"{path}: can't unpack the file ({name}: {e}); not a whole {name} file, fetch it again"
                ) from e
    for magic, what in _REFUSED:
        if content.startswith(magic):
            raise UserError(f"{path}: this is {what}; write it as JSONL, JSON, CSV or TSV (.gz, .bz2 or .xz or not)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start}); save it as UTF-8") from e


def file_names(paths: Sequence[Path]) -> list[str]:
    """What each file is called: its name without endings, and where two are called the same, with as many of its
    folders as tell them apart.

    Raises:
        UserError: a file is given twice.
    """
    whole = [path.resolve() for path in paths]
    if twice := [path for path, n in Counter(whole).items() if n > 1]:
        raise UserError(f"{paths[whole.index(twice[0])]}: the file is given twice; give it once")
    names = [_name(path).stem for path in paths]
    double = [i for i, name in enumerate(names) if names.count(name) > 1]
    folders = range(1, max((len(path.parts) for path in whole), default=1))
    for ending, depth in [(True, 0), *((False, n) for n in folders), *((True, n) for n in folders)]:
        told = {i: "/".join((*whole[i].parts[-1 - depth : -1], whole[i].name if ending else names[i])) for i in double}
        if len({*told.values()}) == len(double):
            return [told.get(i, name) for i, name in enumerate(names)]
    return names


def with_paths(table: Sequence[Row], wanted: Iterable[str]) -> list[Row]:
    """The table with a column for each wanted path that is no column itself and leads somewhere in a row."""
    head = columns_of(table)
    paths = [path for path in dict.fromkeys(wanted) if path not in head and "." in path]
    rows = list(table)
    for path in paths:
        found = [at_path(row.values, path) for row in rows]
        if any(value is not None for value in found):
            rows = [row._replace(values={**row.values, path: v}) for row, v in zip(rows, found, strict=True)]
    return rows


def columns_of(table: Sequence[Row]) -> dict[str, Any]:
    """Every column of a table, with the first row's value where it has one."""
    return dict.fromkeys(column for row in table for column in row.values) | dict(table[0].values if table else {})


def at_path(value: Any, path: str) -> Any:
    """What is at a path of keys and indices; None where it leads nowhere, a list for a path with `*`. A key may hold
    dots itself, and a cell of text may hold JSON."""
    if not path:
        return value
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    head, _, rest = path.partition(".")
    if head == _ALL and isinstance(value, list | dict):
        inner = (at_path(v, rest) for v in (value.values() if isinstance(value, dict) else value))
        return [v for v in inner if v is not None] or None
    if isinstance(value, list):
        index = int(head) if head.lstrip("-").isdecimal() else None
        return at_path(value[index], rest) if index is not None and -len(value) <= index < len(value) else None
    if not isinstance(value, Mapping):
        return None
    for key in sorted((k for k in value if path == k or path.startswith(f"{k}.")), key=len, reverse=True):
        if (found := at_path(value[key], path[len(key) + 1 :])) is not None:
            return found
    return None


def _name(path: Path) -> Path:
    """The path without the ending that says how it is packed."""
    return path.with_suffix("") if path.suffix.lower() in _PACKED else path


def _delimiter(path: Path) -> str | None:
    """What stands between the cells of a CSV or TSV file; None of any other."""
    return {".csv": ",", ".tsv": "\t"}.get(_name(path).suffix.lower())


def _text_rows(path: Path, text: str, hint: str = "") -> list[Placed]:
    if (delimiter := _delimiter(path)) is not None:
        return list(_csv_rows(path, text, delimiter))
    # A file that should be one value, and not lines.
    whole = _name(path).suffix.lower() == ".json" or text.lstrip()[:1] == "["
    readers = (_json_value, _json_lines) if whole else (_json_lines, _json_value)
    try:
        return readers[0](path, text, hint)
    except _NotJSON as first:
        try:  # the other way, under the wrong ending
            return readers[1](path, text, hint)
        except _NotJSON:
            raise UserError(str(first)) from first


class _NotJSON(Exception):
    """Text isn't JSON in one of the two ways; the message is a user's error."""


def _json_value(path: Path, text: str, hint: str) -> list[Placed]:
    return _of_value(path, _parsed(text, str(path), None, hint), hint)


def _json_lines(path: Path, text: str, hint: str) -> list[Placed]:
    # Not splitlines(): it also breaks at characters that JSON allows inside a string.
    lines = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    return [(where, _parsed(line, where, where, hint)) for where, line in lines]


def _parsed(text: str, where: str, line: str | None, hint: str) -> Any:
    """The value of JSON text at a place; `line` is the place of what is wrong in it, by default its own line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise _NotJSON(f"{line or f'{where}:{e.lineno}'}: not valid JSON ({e.msg}, column {e.colno})") from e
    except RecursionError as e:
        raise UserError(f"{where}: nested too deeply{hint}") from e


def _of_value(path: Path, tree: Any, hint: str = "") -> list[Placed]:
    """The rows of one JSON value."""
    if isinstance(tree, dict):
        tree = _of_object(path, tree, hint)
    if not isinstance(tree, list):
        raise UserError(f"{path}: expected a list of rows, found {type(tree).__name__}{hint}")
    return [(f"{path}: row {n}", value) for n, value in enumerate(tree)]


def _is_columns(value: Any) -> bool:
    """An object of lists of plain values, as long as each other: no row has so many lists."""
    if not isinstance(value, dict) or not value or not all(isinstance(v, list) and v for v in value.values()):
        return False
    plain = not any(isinstance(cell, dict | list) for column in value.values() for cell in column)
    return plain and len({len(v) for v in value.values()}) == 1


def _of_object(path: Path, tree: Mapping[str, Any], hint: str) -> list[Any]:
    """The rows of an object of lists, or of the one list of objects that it holds."""
    tables = [k for k, v in tree.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    columns = [k for k, v in tree.items() if isinstance(v, list)]
    if len(tables) == len(columns) == 1:
        return list(tree[tables[0]])
    # As a data frame writes itself: an object of columns, each by the index.
    indexed = [v for v in tree.values() if isinstance(v, dict) and v and all(str(k).isdecimal() for k in v)]
    if tree and len(indexed) == len(tree) and len({tuple(v) for v in indexed}) == 1:
        return [{column: cells[n] for column, cells in tree.items()} for n in indexed[0]]
    if columns and not any(isinstance(v, dict) for v in tree.values()):
        lengths = {k: len(tree[k]) for k in columns}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"`{k}` {n}" for k, n in lengths.items())
            raise UserError(f"{path}: an object of lists that are not equally long ({listed}); each is a column")
        return [dict(zip(columns, row, strict=True)) for row in zip(*(tree[k] for k in columns), strict=True)]
    listed = ", ".join(f"`{k}`" for k in list(tree)[:5])
    raise UserError(
        f"{path}: expected a list of rows, an object of lists (one for each column), or lines of objects; found an "
        f"object with {listed or 'nothing in it'}{hint}"
    )


def _head(text: str, delimiter: str) -> list[str]:
    """The first line of a CSV file."""
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than csv's 128 KiB
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])


def _check_head(path: Path, head: Sequence[str]) -> None:
    """Whether the names of a table's columns can be that.

    Raises:
        UserError: the delimiter is another one, or two columns have one name.
    """
    names = [name.lstrip() for name in head if name.strip()]
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise UserError(f"{path}:1: one column, `{names[0]}`; separate columns by commas, or by tabs in a .tsv file")
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{path}:1: two columns are called `{twice[0]}`; rename one")


def wrong_delimiter(names: Iterable[Any]) -> str | None:
    """What is wrong with a header such as `id;prompt`."""
    for mark, called in ((";", "`;`"), ("\t", "a tab"), ("|", "`|`")):
        if any(mark in str(name) for name in names):
            return f"the delimiter looks to be {called}; save the file with commas between its cells"
    return None


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Placed]:
    # Not splitlines(): it also breaks at characters that a cell may hold.
    # Spaces after commas are dropped only where the first line has them: a cell may begin with one.
    spaced = any(name.startswith(" ") for name in _head(text, delimiter))
    lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced)
    try:
        for values in lines:
            where = f"{path}:{lines.line_num}"
            values.pop("", None)  # pandas writes its index without a name
            extra = values.pop(None, [])
            if extra and any((cell or "").strip() for cell in (*values.values(), *extra)):
                told = wrong_delimiter(lines.fieldnames or ()) or "quote text that holds a comma"
                raise UserError(f"{where}: more cells than the header has columns; {told}")
            yield where, values
    except csv.Error as e:
        raise UserError(f"{path}:{lines.line_num}: not valid CSV ({e})") from e


def _parquet_rows(path: Path) -> list[Placed]:
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as e:  # pyarrow's errors derive from these two
        raise UserError(f"{path}: not a readable Parquet file ({first_line(e)})") from e
    return _of_value(path, rows)


def _whole(value: Any) -> Any:
    """The value with U+FFFD for half surrogate pairs, in all its strings."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(v) for v in value]
    if isinstance(value, dict):
        return {_whole(k): _whole(v) for k, v in value.items()}
    return value
