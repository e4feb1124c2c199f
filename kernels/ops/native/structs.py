"""The structs of programs.cpp, filled by the names of their fields: the C++ text alone declares them."""

from __future__ import annotations

import re
from ctypes import Array, c_int64
from functools import cache

from sentei.kernels.ops.errors import BackendError
from sentei.kernels.ops.native.build import PARTS, SOURCE


def fill_struct(struct: str, /, **values: int) -> Array[c_int64]:
    """Lay out `values` as the struct of this name; BackendError names each field missing or unknown."""
    fields = struct_fields(struct)
    if wrong := {*fields} ^ {*values}:
        missing, unknown = sorted(wrong & {*fields}), sorted(wrong & {*values})
        raise BackendError(f"struct {struct} of {SOURCE.name}: missing {missing}, unknown {unknown}")
    return (c_int64 * len(fields))(*(values[field] for field in fields))


@cache
def struct_fields(struct: str) -> tuple[str, ...]:
    """The fields of a struct of int64_t alone, in C's order."""
    text = re.sub(r"//.*", "", "".join(part.read_text(encoding="utf-8") for part in PARTS))
    found = re.search(rf"\bstruct {struct} {{((?:\s*int64_t [\w\s,]+;)+)\s*}};", text)
    if found is None:
        raise BackendError(f"{SOURCE.name} declares no struct {struct} of int64_t alone")
    return tuple(re.findall(r"\w+", found[1].replace("int64_t", "")))
