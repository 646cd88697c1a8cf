"""Recurrent layers in one piece: columns of inputs and of hidden states are read, the rows of all gates go in
step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch._ops import OpOverload

from efreg.pruning.ids import Axis
from efreg.pruning.rules import Outputs, rule
from efreg.pruning.rules.unknown import unknown
from efreg.pruning.rules.views import in_step
from efreg.pruning.watching import Run


@rule("mkldnn_rnn_layer")
def one_layer(
    run: Run,
    out: Outputs,
    input: Tensor,
    weight0: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    weight3: Tensor,
    hx_: Tensor,
    cx_: Tensor,
    **_: Any,
) -> None:
    """One layer in one direction."""
    _layers(run, out, input, [[[weight0, weight1, weight2, weight3]]], [hx_, cx_])


@rule("_cudnn_rnn", "miopen_rnn")
def all_layers(
    run: Run,
    out: Outputs,
    function: OpOverload,
    input: Tensor,
    weight: Sequence[Tensor],
    weight_stride0: int,
    hx: Tensor,
    cx: Tensor | None = None,
    proj_size: int = 0,
    bidirectional: bool = False,
    **_: Any,
) -> None:
    """weight: weight_stride0 tensors for each layer and direction. Where hidden states are projected all
    stays.
    """
    if proj_size:
        unknown(run, out, function, input=input, weight=weight, hx=hx, cx=cx)
        return
    each = [weight[i : i + weight_stride0] for i in range(0, len(weight), weight_stride0)]
    directions = 2 if bidirectional else 1
    _layers(run, out, input, [each[i : i + directions] for i in range(0, len(each), directions)], [hx, cx])


def _layers(run: Run, out: Outputs, input: Tensor, layers: Sequence, states: Sequence[Tensor | None]) -> None:
    """layers: of each, for each direction, weights [gates · H, in] and [gates · H, H] and biases [gates · H].

    All have the same hidden channels, those of the states [layers · directions, batch, H].
    """
    for axis in run.axes(input)[:-1]:
        run.freeze(axis, "a recurrent layer goes over them")
    known = [x for x in states if x is not None and x.numel()]
    hidden = run.same(*(run.axes(x)[-1] for x in known))
    below: Axis = None
    for depth, layer in enumerate(layers):
        for reader, recurrent, *biases in layer:
            if not depth:
                run.contract(input, input.ndim - 1, reader, 1, argument="input")
            else:
                run.same(below, run.axes(reader)[1])
                run.read(reader, 1)
            hidden = _hidden(run, hidden, reader, recurrent, [x for x in biases if x.numel()])
        below = None if hidden is None else np.concatenate([hidden] * len(layer))
    loud = any(map(run.is_loud, known))
    for x, axis in zip(out, (below, hidden, hidden)):
        if x is not None and x.numel():
            run.name(x, [*[None] * (x.ndim - 1), axis], loud=loud)


def _hidden(run: Run, hidden: Axis, reader: Tensor, recurrent: Tensor, biases: Sequence[Tensor]) -> Axis:
    """The hidden channels with those of a layer: rows of each gate, columns that read the states before."""
    run.read(recurrent, 1)
    run.take(recurrent, 1)
    for x in (reader, recurrent):
        run.write(x, 0)
    for x in biases:
        run.carry(run.axes(x)[0])
    gates = len(recurrent) // recurrent.shape[1]
    rows = [in_step(run, run.axes(x)[0], gates) for x in (reader, recurrent, *biases)]
    return run.same(hidden, run.axes(recurrent)[1], *rows)


@rule("_thnn_fused_lstm_cell")
def lstm_cell(
    run: Run,
    out: Outputs,
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    **_: Any,
) -> None:
    """One step on a GPU: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c')."""
    _cell(run, out[:2], cx, [input_gates, hidden_gates], [input_bias, hidden_bias])


@rule("_thnn_fused_gru_cell")
def gru_cell(
    run: Run,
    out: Outputs,
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    **_: Any,
) -> None:
    """One step on a GPU: h' = (1 − σ(z)) tanh(n) + σ(z) h."""
    _cell(run, out[:1], hx, [input_gates, hidden_gates], [input_bias, hidden_bias])


def _cell(
    run: Run, outs: Sequence[Tensor], state: Tensor, gates: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> None:
    """The gates, [batch, gates · H] and biases [gates · H], go in step with the state [batch, H]."""
    biases = [x for x in biases if x is not None]
    for x in biases:
        run.carry(run.axes(x)[0])
    parts = gates[0].shape[1] // state.shape[1]
    rows = [in_step(run, run.axes(x)[-1], parts) for x in (*gates, *biases)]
    channels = run.same(run.axes(state)[1], *rows)
    for each in outs:
        run.name(each, [None, channels], loud=run.is_loud(state))
