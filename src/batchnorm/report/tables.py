"""The tables of a Run as NumPy arrays, and medians over their groups.

A missing table is empty and a missing column is NaN: an interrupted Run reads like a short one. Words (arm, layer) are
stored as codes into a list of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A column of words: row i is names[codes[i]]."""

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
        """The table of the Run, or an empty one. Raises RunError if a part is damaged."""
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
        """A column of numbers; all NaN if it does not exist."""
        return self.numbers[column] if column in self.numbers else np.full(len(self), np.nan)

    def names(self, column: str) -> list[str]:
        """The words that occur in a column, in order of first appearance; empty if it does not exist."""
        return [*dict.fromkeys(self.texts(column))] if column in self.words else []

    def texts(self, column: str) -> list[str]:
        codes, names = self.words.get(column, Words(np.zeros(len(self), np.int64), [""]))
        return [names[code] for code in codes.tolist()]

    def where(self, mask: Mask | NDArray[np.int64]) -> Table:
        """Select rows by a mask or by their numbers."""
        words = {name: Words(word.codes[mask], word.names) for name, word in self.words.items()}
        return Table({name: column[mask] for name, column in self.numbers.items()}, words)

    def rows(self, **values: Value) -> Table:
        """The rows where each named column has this value: rows(arm="learned", step=0)."""
        mask = np.ones(len(self), bool)
        for column, value in values.items():
            if column in self.words:
                codes, names = self.words[column]
                mask &= np.isin(codes, [place for place, name in enumerate(names) if name == value])
            else:
                mask &= False if isinstance(value, str) else self[column] == value
        return self.where(mask)

    def with_column(self, name: str, values: Array) -> Table:
        return Table({**self.numbers, name: values}, self.words)

    def labelled(self, column: str, word: str) -> Table:
        """The same rows with a new column that is `word` in every row."""
        return Table(self.numbers, {**self.words, column: Words(np.zeros(len(self), np.int64), [word])})

    @classmethod
    def stack(cls, tables: Sequence[Table]) -> Table:
        """Concatenate tables with the same columns; tables without rows are skipped."""
        tables = [table for table in tables if len(table)]
        if not tables:
            return Table({})
        numbers = {name: np.concatenate([table[name] for table in tables]) for name in tables[0].numbers}
        words = {}
        for name in tables[0].words:
            columns = [table.words[name] for table in tables]
            code_of = {word: code for code, word in enumerate(dict.fromkeys(w for c in columns for w in c.names))}
            codes = [np.array([code_of[word] for word in part.names], np.int64)[part.codes] for part in columns]
            words[name] = Words(np.concatenate(codes), [*code_of])
        return Table(numbers, words)

    def medians(self, column: str, by: tuple[str, ...]) -> Table:
        """The median of a column's finite values per group; NaN if a group has none."""
        keys, grid = self.grids(by, column)
        return keys.with_column(column, known_quantiles(grid[column], (0.5,))[0])

    def means(self, column: str, by: tuple[str, ...]) -> Table:
        """The mean of a column's finite values per group; for 0s and 1s it is a share."""
        keys, grid = self.grids(by, column)
        return keys.with_column(column, known_mean(np.where(np.isfinite(grid[column]), grid[column], np.nan)))

    def spreads(self, column: str, by: tuple[str, ...]) -> Table:
        """median, low and high of a column's finite values per group."""
        keys, grid = self.grids(by, column)
        low, median, high = known_quantiles(grid[column], (0.0, 0.5, 1.0))
        return Table({**keys.numbers, "median": median, "low": low, "high": high}, keys.words)

    def grids(self, by: Sequence[str], *columns: str) -> tuple[Table, dict[str, Array]]:
        """The keys of the groups in order, and each column as an array (groups, rows per group), padded with NaN."""
        _, first, group, count = np.unique(self._group_codes(by), True, True, True)
        order = np.argsort(group, kind="stable")
        within = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
        grids = {column: np.full((len(count), int(count.max(initial=0))), np.nan) for column in columns}
        for column, grid in grids.items():
            grid[group[order], within] = self[column][order]
        keys = self.where(first)
        words = {name: word for name, word in keys.words.items() if name in by}
        return Table({name: values for name, values in keys.numbers.items() if name in by}, words), grids

    def records(self, *columns: str) -> list[dict[str, Value]]:
        """The rows as dictionaries for a chart: rounded, with None for values that are not finite."""
        lists = [self.texts(name) if name in self.words else rounded(self[name]) for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def groups(self, *by: str) -> list[NDArray[np.int64]]:
        """The row numbers of each group, in the order of the keys."""
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
                values, inverse = np.unique(self[key], return_inverse=True)
                codes = codes * len(values) + inverse
        return codes


def known_quantiles(values: Array, shares: Sequence[float]) -> Array:
    """Quantiles of each row's finite values as an array (shares, rows); NaN for rows without any."""
    result = np.full((len(shares), len(values)), np.nan)
    finite = np.isfinite(values)
    if not finite.any():
        return result
    ordered = np.sort(values if finite.all() else np.where(finite, values, np.nan), axis=1)  # NaN comes last
    count = finite.sum(axis=1)
    some = np.flatnonzero(count)
    for row, share in enumerate(shares):
        position = share * (count[some] - 1)
        below = np.floor(position).astype(np.int64)
        above = np.minimum(below + 1, count[some] - 1)
        part = position - below
        result[row, some] = ordered[some, below] * (1 - part) + ordered[some, above] * part
    return result


def known_mean(values: Array) -> Array:
    """The mean of each row's values that are not NaN; NaN for rows without any. For 0s and 1s it is a share."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1)
    mean: Array = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


def rounded(values: Array, digits: int = SIGNIFICANT) -> list[float | int | None]:
    """Round numbers to significant digits for JSON: whole numbers as int, None for values that are not finite."""

    def plain(value: float) -> float | int | None:
        if not np.isfinite(value):
            return None
        return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.{digits}g}")

    return [plain(value) for value in values.tolist()]


def jsonable(value: Any) -> Any:
    """Convert dataclasses to dictionaries (by `as_dict` if defined), also inside of containers."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if is_dataclass(value):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    return value
