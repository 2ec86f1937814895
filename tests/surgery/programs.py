"""Random forwards: modules, in-place changes, aliases, branches and loops in any order, as source that Python runs."""

from __future__ import annotations

import linecache
import random
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

VARIABLES = ["x", "a", "b", "c"]
MODULES = ["conv1", "conv2", "bn1", "bn2", "bn1", "bn2", "relu", "quiet", "ident", "tail", "block"]


class Tail(nn.Module):
    """Ends in a batch norm, of its own or of its parent."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(3, 3, 1), norm, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.act(x)


class Base(nn.Module):
    """What the programs call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=0.6)
        self.relu, self.quiet, self.ident = nn.ReLU(), nn.LeakyReLU(0.3, inplace=True), nn.Identity()
        self.tail = Tail(nn.BatchNorm1d(3))
        self.block = nn.Sequential(nn.Conv1d(3, 3, 1), Tail(self.bn1))
        self.flag, self.nothing, self.norms = True, None, nn.ModuleList([self.bn2, nn.BatchNorm1d(3)])

    def halve(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)

    def other(self, x: Tensor) -> Tensor:
        return self.bn2(x).tanh()


class Program:
    """A random forward; `source` is its text."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        body = ["a = b = c = x", *self.block(self.random.randint(3, 9), 0)]
        lines = ["class Model(Base):", "    def forward(self, x):", *[f"        {line}" for line in body]]
        self.source = "\n".join([*lines, f"        return {self.expression(1)}", ""])

    def name(self) -> str:
        return self.random.choice(VARIABLES)

    def call(self, argument: str) -> str:
        kind = self.random.random()
        if kind < 0.6:
            return f"self.{self.random.choice(MODULES)}({argument})"
        if kind < 0.65:
            return f"self.norms[0]({argument})"
        if kind < 0.7:
            return f"self.{self.random.choice(['halve', 'other'])}({argument})"
        functions = ["F.relu(%s)", "F.silu(%s, inplace=True)", "torch.tanh(%s)", "F.elu(%s, self.flag)", "F.gelu(%s)"]
        methods = ["%s.relu()", "%s.relu_()", "%s.clone()", "%s.sigmoid()", "F.leaky_relu(%s, 0.2)"]
        return self.random.choice(functions + methods) % argument

    def expression(self, depth: int) -> str:
        kind = self.random.random()
        if depth <= 0 or kind < 0.15:
            return self.name()
        if kind < 0.65:
            return self.call(self.expression(depth - 1))
        if kind < 0.85:
            left, right = self.expression(depth - 1), self.expression(depth - 2)
            if self.random.random() < 0.5:
                left, right = right, left
            forms = ["(%s + %s)", "torch.add(%s, %s)", "%s.add(%s)", "%s.add_(%s)", "(%s - %s)"]
            return self.random.choice(forms[:2] * 3 + forms[2:]) % (left, right)
        if kind < 0.9:
            return f"{self.call(self.name())}[:, :, :1]"
        test = self.random.choice(["self.flag", "self.training", "self.nothing is None"])
        return f"({self.expression(depth - 1)} if {test} else {self.expression(depth - 1)})"

    def statement(self, depth: int) -> list[str]:
        kind = self.random.random()
        v = self.name()
        if kind < 0.3:
            return [f"{v} = self.{self.random.choice(MODULES)}({v if self.random.random() < 0.7 else self.name()})"]
        if kind < 0.5:
            return [f"{v} = {self.expression(self.random.randint(1, 3))}"]
        if kind < 0.6:
            return [f"{v} = {v} + {self.expression(self.random.randint(0, 2))}"]
        if kind < 0.7:
            return [f"if {v}.shape == x.shape: {v} += {self.name()}[:, :, :1]" if depth else f"{v} = {v} * 1.0"]
        if kind < 0.76:
            return [f"{v} = {self.call(v)}"]
        if kind < 0.8 or depth >= 2:
            return [self.random.choice([f"{v} = {self.name()}", f"{v} += 1.0", "pass", f"self.halve({v})"])]
        head = self.random.choice(
            ["if self.flag:", "if self.training:", "if self.nothing is not None:", f"if float({v}.sum()) > 0:"] * 2
            + ["for i in range(2):", "with nullcontext():", "try:", "for i in range(2):"]
        )
        lines = [head, *self.indented(depth)]
        if head.startswith("for") and self.random.random() < 0.4:
            lines += [
                f"    {self.random.choice(['if i == 0: continue', 'if self.flag: break'])}",
                *self.indented(depth),
            ]
        if head == "try:":
            if self.random.random() < 0.6:
                lines.append(f"    {v} = {self.call(v)}")
                lines.append("    raise ZeroDivisionError")
            lines += ["except ZeroDivisionError:", *self.indented(depth)]
        elif head.startswith("if"):
            if self.random.random() < 0.25:
                lines.append(f"    return {self.expression(1)}")
            if self.random.random() < 0.5:
                lines += ["else:", *self.indented(depth)]
        return lines

    def block(self, length: int, depth: int) -> list[str]:
        return [line for _ in range(length) for line in self.statement(depth)]

    def indented(self, depth: int) -> list[str]:
        return [f"    {line}" for line in self.block(self.random.randint(1, 3), depth + 1)]

    def model(self, name: str) -> nn.Module:
        """An instance, whose source can be found."""
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        namespace = {"Base": Base, "torch": torch, "F": F, "nullcontext": nullcontext, "__name__": __name__}
        exec(compile(self.source, name, "exec", dont_inherit=True), namespace)
        return namespace["Model"]()
