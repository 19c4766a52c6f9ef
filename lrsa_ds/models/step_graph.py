"""What is changed in the graph of a compiled decoding step, before a backend compiles it.

Linear layers of one input become one `few_rows`, with the normalisation in front of them, the activation between gate
and up of an MLP, and the residual that is added. The rotation of queries and keys by their positions moves into
`attend_step`. What a model computes in another way stays as it is.
"""

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.nn.functional import linear, silu

from lrsa_ds.models.few_rows import can_join
from lrsa_ds.models.fused_few_rows import MOST_WEIGHTS

LINEAR = (linear, torch._C._nn.linear)
PARAMETERS = ("placeholder", "get_attr")  # operations that give them


def join_operators(graph: Graph) -> None:
    """Changes the graph of a step as `torch.compile` traces it."""
    groups: dict[Any, list[Node]] = {}
    rotations: dict[Any, tuple[Node, Node]] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in LINEAR and _fits(node):
            x, _, bias = _inputs(node)
            groups.setdefault((x, bias is None), []).append(node)
        elif node.target is torch.ops.lrsa_ds.attend_step.default:
            _rotate_within(node, rotations)
    for layers in groups.values():
        for start in range(0, len(layers), MOST_WEIGHTS):
            _join(graph, layers[start : start + MOST_WEIGHTS])
    _name_weights_behind(graph)
    graph.eliminate_dead_code()


def _value(node: Node) -> torch.Tensor:
    """A tensor with the shape, dtype and device of the result of a node."""
    return node.meta["example_value"]


def _inputs(node: Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a linear layer."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def _fits(node: Node) -> bool:
    """Whether `few_rows` can compute a linear layer."""
    x, *parameters = [given for given in _inputs(node) if given is not None]
    if any(given.op not in PARAMETERS for given in parameters):
        return False
    return _value(node).dtype == _value(x).dtype and can_join(_value(x), [_value(given) for given in parameters])


def _join(graph: Graph, layers: list[Node]) -> None:
    """Puts one product in the place of linear layers of one input."""
    layers, output, residual = _with_what_follows(layers)
    inputs = [_inputs(layer) for layer in layers]
    x, weights, biases = _whole(inputs[0][0]), [w for _, w, _ in inputs], [b for *_, b in inputs if b is not None]
    x, norm, eps = _norm(x) or (x, None, 0.0)
    is_gated = len(layers) == 2 and output is not None
    with graph.inserting_before(output or layers[0]):
        given = (x, weights, biases, is_gated, norm, eps, residual)
        joined = graph.call_function(torch.ops.lrsa_ds.few_rows.default, given)
        if output is not None:
            _replace(output, joined)
            return
        start = 0
        for layer, weight in zip(layers, weights, strict=True):
            size = len(_value(weight))
            _replace(layer, graph.call_function(torch.narrow, (joined, -1, start, size)))
            start += size


def _replace(old: Node, new: Node) -> None:
    new.meta["example_value"] = _value(old)
    old.replace_all_uses_with(new)


def _whole(node: Node) -> Node:
    """What a node takes a slice of, if the slice is all of it, as that of the last tokens of a step is."""
    if node.target is operator.getitem:
        source, at = node.args
        if isinstance(at, tuple) and all(type(index) is slice for index in at) and _is_like(source, node):
            return cast(Node, source)
    return node


def _with_what_follows(layers: list[Node]) -> tuple[list[Node], Node | None, Node | None]:
    """The layers, the one node that takes their outputs into the product, and the residual that it adds.

    The node is silu(gate) * up, with gate as the first layer, or a sum of one layer and a residual. None if neither.
    """
    if len(layers) == 1:
        totals = [node for node in layers[0].users if node.target is operator.add]
        others: list[Any] = [other for total in totals for other in total.args if other is not layers[0]]
        if len(layers[0].users) == len(totals) == len(others) == 1 and _is_like(others[0], layers[0]):
            return layers, totals[0], others[0]
        return layers, layers[0], None
    if len(layers) == 2 and _inputs(layers[0])[2] is None:
        for gate, up in (layers, layers[::-1]):
            activated = [node for node in gate.users if node.target is silu]
            products = [node for found in activated for node in found.users if node.target is operator.mul]
            if products and list(up.users) == products and len(gate.users) == len(activated[0].users) == 1:
                return [gate, up], products[0], None
    return layers, None, None


def _is_like(node: Any, other: Node) -> bool:
    """Whether a node gives tensors of the same shape and dtype as another."""
    if not isinstance(node, Node):
        return False
    x, y = _value(node), _value(other)
    return isinstance(x, torch.Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


def _norm(node: Node) -> tuple[Node, Node, float] | None:
    """x, weight and epsilon if a node is weight * (x / sqrt(mean(x ** 2) + epsilon)), else None."""
    try:
        weight, normalised = _arguments(node, operator.mul)
        product, dtype = _arguments(normalised, "to")
        exact, inverse = _arguments(product, operator.mul)
        mean, eps = _arguments(_arguments(inverse, torch.rsqrt)[0], operator.add)
        squares, *dims = _arguments(mean, "mean")
        x, exact_dtype = _arguments(exact, "to")
        if _arguments(squares, "pow") != (exact, 2) or weight.op not in PARAMETERS or _value(weight).dim() != 1:
            raise _AnotherNode
    except (_AnotherNode, ValueError):
        return None
    is_norm = (dims, mean.kwargs, exact_dtype) == ([-1], {"keepdim": True}, torch.float32) and isinstance(eps, float)
    # In fp16 a row that is not yet divided by its root mean square may be too large.
    is_one_dtype = dtype == _value(x).dtype == _value(weight).dtype != torch.float16
    return (x, weight, eps) if is_norm and is_one_dtype else None


def _name_weights_behind(graph: Graph) -> None:
    """Names to gate and up of an MLP the weight that is read behind them. They read for so long that it pays."""
    gated = None
    for node in graph.nodes:
        if node.target is torch.ops.lrsa_ds.few_rows.default:
            _, weights, _, is_gated, *_ = node.args
            if gated is not None and len(weights) == 1 and weights[0].op == "placeholder":
                gated.args = (*gated.args, weights[0])
            gated = node if is_gated else None


def _rotate_within(attend: Node, known: dict[Any, tuple[Node, Node]]) -> None:
    """Moves the rotation of the queries and of the key of a step into its attention.

    Args:
        known: cosine and sine of the rotations of earlier layers, to which those of this one are added.
    """
    q, k = _rotation(attend.args[0]), _rotation(attend.args[1])
    if q is not None and k is not None and q[1:] == k[1:]:
        # Each layer adds the dim of the heads to the same cosine and sine, and a compiler would write them for each.
        given = tuple(x.args if x.target == "unsqueeze" else x for x in q[1:])
        is_known = given in known
        if not is_known:
            with attend.graph.inserting_before(attend):
                known[given] = cast(Any, tuple(_stored(attend.graph, x) for x in q[1:]))
        attend.args = (q[0], k[0], *attend.args[2:], *known[given], is_known)


def _stored(graph: Graph, x: Node) -> Node:
    node = graph.call_function(torch.ops.lrsa_ds.stored.default, (x,))
    node.meta["example_value"] = _value(x)
    return node


def _rotation(node: Any) -> tuple[Node, Node, Node] | None:
    """x, cos and sin if a node is x * cos + cat(-high, low) * sin for the halves of x [B, H, 1, D], else None."""
    try:
        (x, cos), (turned, sin) = (_arguments(term, operator.mul) for term in _arguments(node, operator.add))
        negative, low = _arguments(turned, torch.cat)[0]
        (high,) = _arguments(negative, operator.neg)
        halves = [_arguments(part, operator.getitem) for part in (low, high)]
    except (_AnotherNode, ValueError):
        return None
    size, middle = _value(x).shape, _value(x).shape[-1] // 2
    expected = [(x, (..., slice(None, middle, None))), (x, (..., slice(middle, None, None)))]
    has_halves = halves == expected and turned.kwargs == {"dim": -1}
    has_shapes = all(tuple(_value(y).shape) in ((1, 1, 1, size[3]), (size[0], 1, 1, size[3])) for y in (cos, sin))
    return (x, cos, sin) if has_halves and has_shapes else None


class _AnotherNode(Exception):
    """A node is not what is looked for."""


def _arguments(node: Any, target: Any) -> tuple:
    if not isinstance(node, Node) or node.target != target:
        raise _AnotherNode
    return node.args
