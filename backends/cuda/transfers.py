"""Entries of a GPU's library take and give tensors of the CPU: they copy, and call what works on the GPU alone."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from graphopt.backends.lowering import WEIGHT_COUNT

_CPU, _GPU = 1, 2  # DLPack's numbers of devices
_COPY = relax.ExternFunc("vm.builtin.to_device")


@tvm.transform.module_pass(opt_level=0)
def copy_to_and_from(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Weights are on the GPU already; all other arguments and all results are copied."""
    for variable, function in list(module.functions.items()):
        if isinstance(function, relax.Function) and WEIGHT_COUNT in (function.attrs or {}):
            inner = function.without_attr("global_symbol")
            name = f"{variable.name_hint}_on_gpu"
            builder = relax.BlockBuilder(module)
            called = builder.add_func(inner, name)
            outer = _copying(builder, relax.utils.copy_with_new_vars(function), called)
            module = builder.get()
            module.update_func(module.get_global_var(variable.name_hint), outer)
    return module


def _copying(builder: relax.BlockBuilder, like: relax.Function, called: Any) -> relax.Function:
    count = len(like.params) - int(like.attrs[WEIGHT_COUNT])
    bindings: list[Any] = []

    def bind(value: Any, kind: Any) -> relax.Var:
        variable = relax.Var(f"copy{len(bindings)}", kind)
        bindings.append(relax.VarBinding(variable, value))
        return variable

    def copied(value: Any, kind: Any, device: int) -> relax.Var:
        return bind(relax.Call(_COPY, [value, relax.prim_value(device), relax.prim_value(0)], ty_args=[kind]), kind)

    given = [copied(each, each.ty, _GPU) for each in like.params[:count]]
    results = bind(relax.Call(called, [*given, *like.params[count:]]), like.ret_ty)
    if isinstance(like.ret_ty, relax.TupleType):
        kinds = list(like.ret_ty.fields)
        parts = [bind(relax.TupleGetItem(results, number), kind) for number, kind in enumerate(kinds)]
        fetched = [copied(part, kind, _CPU) for part, kind in zip(parts, kinds, strict=True)]
        result = bind(relax.Tuple(fetched), like.ret_ty)
    else:
        result = copied(results, like.ret_ty, _CPU)
    body = relax.SeqExpr([relax.BindingBlock(bindings)], result)
    return relax.Function(like.params, body, like.ret_ty, False, like.attrs)
