"""YAML as files of ours are read: within limits, and no value that YAML 1.1 reads as something else."""

from __future__ import annotations

import re

import yaml

# Octal, hexadecimal, binary, base 60: what stands there is not what comes out.
_TRAP = re.compile(r"[-+]?(0[0-7_]+|0[xb][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class LimitedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which gives up on deep nesting before Python's stack does."""

    max_depth = 30
    max_nodes = 10_000
    too_many = "more than 10,000 keys and values"
    depth = 0
    num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read one node; raises MarkedYAMLError, which knows its line, beyond the limits."""
        self.depth += 1
        self.num_nodes += 1
        if self.num_nodes > self.max_nodes:
            raise yaml.MarkedYAMLError(problem=self.too_many, problem_mark=self.get_mark())
        if self.depth > self.max_depth:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def is_misread(node: yaml.ScalarNode) -> bool:
    """Whether a plain value is to YAML another number than to people, such as 064, 0x10 or 1:30."""
    is_number = node.style is None and node.tag.endswith((":int", ":float"))
    return is_number and _TRAP.fullmatch(node.value) is not None


def fault_line(error: yaml.YAMLError) -> int:
    """The line of a YAML error, from 1 on; 1 where it knows none."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line + 1 if mark else 1
