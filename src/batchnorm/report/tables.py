"""The tables of a Run as NumPy arrays, and medians over their groups.

A table that the Run does not have is empty, a column that a table does not have is NaN: an interrupted Run reads like
a short one. Words (arm, layer) are kept as codes into a list of names, so that a million rows share one string.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchnorm.runs.run import Run

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Value = float | int | str | None

SIGNIFICANT = 5


class Words(NamedTuple):
    """A column of words: row i says names[codes[i]]; the names stand in order of first appearance."""

    codes: NDArray[np.int64]
    names: list[str]


class Table:
    """Columns of equal length: numbers as float64, words as codes."""

    def __init__(self, numbers: Mapping[str, Array], words: Mapping[str, Words] | None = None) -> None:
        self.numbers = dict(numbers)
        self.words = dict(words or {})
        columns = [*self.numbers.values(), *(word.codes for word in self.words.values())]
        self._length = len(columns[0]) if columns else 0

    @classmethod
    def read(cls, run: Run, name: str) -> Self:
        """The table of the Run, or an empty one. Raises RunError where a part is damaged."""
        if name not in run.tables():
            return cls({})
        source = run.table(name)
        numbers, words = {}, {}
        for column in source.column_names:
            values = source[column].combine_chunks()
            if pa.types.is_dictionary(values.type):
                values = values.cast(values.type.value_type)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                coded = values.fill_null("").dictionary_encode()
                codes = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
                words[column] = Words(codes, [str(entry) for entry in coded.dictionary.to_pylist()])
            elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
                numbers[column] = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return cls(numbers, words)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, column: str) -> Array:
        """A column of numbers; NaN throughout where there is none of that name."""
        found = self.numbers.get(column)
        return np.full(len(self), np.nan) if found is None else found

    def names(self, column: str) -> list[str]:
        """The words that occur in a column, in order of first appearance; none where there is no such column."""
        found = self.words.get(column)
        if found is None:
            return []
        codes, first = np.unique(found.codes, return_index=True)
        return [found.names[code] for code in codes[np.argsort(first)]]

    def texts(self, column: str) -> list[str]:
        """A column of words, row by row."""
        found = self.words.get(column, Words(np.zeros(len(self), np.int64), [""]))
        return [found.names[code] for code in found.codes.tolist()]

    def where(self, mask: Mask) -> Table:
        """The rows where `mask` is true."""
        words = {name: Words(word.codes[mask], word.names) for name, word in self.words.items()}
        return Table({name: column[mask] for name, column in self.numbers.items()}, words)

    def rows(self, **values: Value) -> Table:
        """The rows where each named column has the value given: rows(arm="learned", step=0)."""
        mask = np.ones(len(self), bool)
        for column, value in values.items():
            if isinstance(value, str):
                found = self.words.get(column)
                same = [] if found is None else [i for i, name in enumerate(found.names) if name == value]
                mask &= np.isin(found.codes, same) if found is not None else False
            else:
                mask &= self[column] == value
        return self.where(mask)

    def with_column(self, name: str, values: Array) -> Table:
        """The same rows with one more column of numbers, or another in its place."""
        return Table({**self.numbers, name: values}, self.words)

    def labelled(self, column: str, word: str) -> Table:
        """The same rows with one more column, which says `word` throughout."""
        return Table(self.numbers, {**self.words, column: Words(np.zeros(len(self), np.int64), [word])})

    @classmethod
    def stack(cls, tables: Sequence[Table]) -> Table:
        """Tables with the same columns, one below the other; those without rows count for nothing."""
        tables = [table for table in tables if len(table)]
        if not tables:
            return Table({})
        numbers = {name: np.concatenate([table[name] for table in tables]) for name in tables[0].numbers}
        words = {}
        for name in tables[0].words:
            columns = [table.words[name] for table in tables]
            names = [*dict.fromkeys(word for column in columns for word in column.names)]
            place = {word: code for code, word in enumerate(names)}
            codes = [np.array([place[word] for word in each.names], np.int64)[each.codes] for each in columns]
            words[name] = Words(np.concatenate(codes), names)
        return Table(numbers, words)

    def medians(self, column: str, by: tuple[str, ...]) -> Table:
        """The median of a column's finite values in each group; NaN where a group has none."""
        return self._reduce(column, by, {column: _middle})

    def means(self, column: str, by: tuple[str, ...]) -> Table:
        """The mean of a column's finite values in each group; of 0s and 1s it is a share."""
        return self._reduce(column, by, {column: _mean})

    def spreads(self, column: str, by: tuple[str, ...]) -> Table:
        """median, low and high of a column's finite values in each group."""
        return self._reduce(column, by, {"median": _middle, "low": _lowest, "high": _highest})

    def records(self, *columns: str) -> list[dict[str, Value]]:
        """The rows as dictionaries for a chart: rounded, and None for what is not finite."""
        lists = [self.texts(name) if name in self.words else rounded(self[name]) for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def groups(self, *by: str) -> list[NDArray[np.int64]]:
        """The rows of each group that has the same values in these columns, as positions."""
        codes = self._group_codes(by)
        order = np.argsort(codes, kind="stable")
        edges = np.flatnonzero(np.diff(codes[order])) + 1
        return [rows for rows in np.split(order, edges) if len(rows)]

    def _group_codes(self, by: Sequence[str]) -> NDArray[np.int64]:
        codes = np.zeros(len(self), np.int64)
        for key in by:
            if key in self.words:
                codes = codes * len(self.words[key].names) + self.words[key].codes
            else:
                found, places = np.unique(self[key], return_inverse=True)
                codes = codes * len(found) + places
        return codes

    def _reduce(self, column: str, by: tuple[str, ...], results: Mapping[str, Reduction]) -> Table:
        """One row a group, in the order of the groups' keys."""
        if len(self) == 0:
            return Table({})
        codes = self._group_codes(by)
        groups, first, codes = np.unique(codes, return_index=True, return_inverse=True)
        values = self[column]
        finite = np.isfinite(values)
        codes, values = codes[finite], values[finite]
        order = np.lexsort((values, codes))
        count = np.bincount(codes, minlength=len(groups))
        keys = {key: self[key][first] for key in by if key not in self.words}
        words = {key: Words(self.words[key].codes[first], self.words[key].names) for key in by if key in self.words}
        reduced = {name: _filled(reduce, values[order], count) for name, reduce in results.items()}
        return Table({**keys, **reduced}, words)


Reduction = Callable[[Array, NDArray[np.int64], NDArray[np.int64]], Array]


def rounded(values: Array, digits: int = SIGNIFICANT) -> list[float | int | None]:
    """Numbers as JSON holds them: so many significant digits, whole numbers whole, None for what is not finite."""
    result: list[float | int | None] = []
    for value in values.tolist():
        if not np.isfinite(value):
            result.append(None)
        elif value == int(value) and abs(value) < 2**53:
            result.append(int(value))
        else:
            result.append(float(f"{value:.{digits}g}"))
    return result


def _filled(reduce: Reduction, values: Array, count: NDArray[np.int64]) -> Array:
    """`reduce` on the groups that have a value, NaN for the others; `values` are sorted within their groups."""
    result = np.full(len(count), np.nan)
    some = count > 0
    if some.any():
        result[some] = reduce(values, (np.cumsum(count) - count)[some], count[some])
    return result


def _middle(values: Array, start: NDArray[np.int64], count: NDArray[np.int64]) -> Array:
    middle: Array = values[start + (count - 1) // 2] / 2 + values[start + count // 2] / 2
    return middle


def _mean(values: Array, start: NDArray[np.int64], count: NDArray[np.int64]) -> Array:
    mean: Array = np.add.reduceat(values, start) / count
    return mean


def _lowest(values: Array, start: NDArray[np.int64], count: NDArray[np.int64]) -> Array:
    return values[start]


def _highest(values: Array, start: NDArray[np.int64], count: NDArray[np.int64]) -> Array:
    highest: Array = values[start + count - 1]
    return highest


def jsonable(value: Any) -> Any:
    """Dataclasses as dictionaries, by their own `as_dict` where they have one, through every container."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if is_dataclass(value):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return value
