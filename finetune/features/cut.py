"""A network in two parts at a stage boundary: the trunk, which is frozen and runs once, and the rest, which learns.

The parts are found in the graph that torch.fx traces. A module that lies wholly in one stage is one step of that graph
and is called as it is, so only the few lines that join the stages need be traceable. A step belongs to

- the trunk, if a layer of the trunk needs its result;
- the rest, if it needs the result of a layer of the rest;
- the trunk, if neither holds and it does the same in train and in eval mode, as a flattening does and a dropout not.

What depends on the images by their size alone, such as position embeddings, is computed anew in the part that needs it.
The network is traced in both modes, because a forward may read `self.training`: inception's auxiliary head is there
only while training. What crosses the boundary in either mode is put out by the trunk.

Shapes: B images, C channels, H × W pixels or positions, D features.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.fx.graph_module import _copy_attr

from finetune.errors import ModelError, first_ten
from finetune.features.listener import FrozenTrunk, Listener, MeanOverPositions
from finetune.models.heads import head_layers, head_module
from finetune.models.stage_outputs import StageOutputs, find_stage_outputs
from finetune.models.stages import Stage, stage_tensors
from finetune.models.tracing import NetworkTracer
from finetune.models.twins import twin_of

_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_SIZE_METHODS = ("size", "dim", "numel")

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A network in two parts: `rest(*trunk(images))` is what the network returns, bit for bit in eval mode.

    In train mode it is what the network returns once `freeze_stages` has frozen the stages of the trunk, with the same
    random numbers.

    Attributes:
        boundary: Name of the trunk's last stage.
        trunk: Images (B, C, H, W) → a tuple of the tensors that cross the boundary, each (B, …), in the order in which
            they are computed. It is always in eval mode and keeps no gradients. It shares its tensors with the network
            but not its modules, so the network must be on its device before it is cut.
        rest: Those tensors → what the network returns. Its modules and parameters are the network's, under the
            network's names: whoever trains the one trains the other.
    """

    boundary: str
    trunk: nn.Module
    rest: nn.Module


def cut_model(model: nn.Module, stages: Sequence[Stage], count: int) -> Cut:
    """Cut `model` so that the trunk holds its first `count` stages.

    With all stages but the head in the trunk, the input of the output layer crosses: pooled features, or a map of them
    where that layer is a convolution. This boundary does without a trace, by listening to the output layer.

    Args:
        model: A classifier of images. Its forward and the modes of its modules stay as they are.
        stages: Those of `find_stages(model)`.
        count: From 1 to one less than there are stages; `possible_cuts` tells which can be had.

    Raises:
        ModelError: torch.fx cannot trace the network, or its layers do not run in the order of its stages. The trunk
            raises it, too, if what crosses turns out to be other than tensors with a row for each image.
    """
    assert 0 < count < len(stages), f"the trunk cannot hold {count} of {len(stages)} stages"
    boundary = stages[count - 1].name
    trunk: nn.Module
    try:
        trunk, rest = _split(_trace(model, stages), count)
    except ModelError as error:
        if count < len(stages) - 1:
            *others, _ = (stages[other].name for other in possible_cuts(model, stages))
            raise ModelError(
                f"{type(model).__name__} cannot be cut before stage {stages[count].name}: {error.message}",
                f"cut it at the pooled features, or before one of {first_ten(others)}"
                if others
                else "the pooled features are the only boundary",
            ) from error
        trunk, rest = _split_at_output_layer(model)
    return Cut(boundary=boundary, trunk=FrozenTrunk(trunk, boundary), rest=rest)


def possible_cuts(model: nn.Module, stages: Sequence[Stage]) -> tuple[int, ...]:
    """Return each `count` at which `cut_model` can cut, in ascending order.

    The last one, all stages but the head, is always among them: it does without a trace. A network that is all head
    cannot be cut.
    """
    if len(stages) == 1:
        return ()
    counts = []
    with suppress(ModelError):
        traced = _trace(model, stages)
        for count in range(1, len(stages) - 1):
            with suppress(ModelError):
                _split(traced, count)
                counts.append(count)
    return (*counts, len(stages) - 1)


def feature_trunk(model: nn.Module, outputs: Sequence[str] = ()) -> nn.Module:
    """Return the module from images (B, C, H, W) to pooled features (B, D), the input of the main output layer.

    Behind them come the pooled `outputs` of the modules at these paths. Of a map (B, D, H, W) it takes the mean over
    the positions. Like every trunk it is always in eval mode, keeps no gradients, and shares the tensors of `model` but
    not its modules.

    Raises:
        ModelError: The network has no output layer, or one that is neither linear nor a convolution.
    """
    head_module(model)
    attached = find_stage_outputs(model)
    first = attached[0] if attached else head_layers(model)[0]
    listener = Listener(twin_of(model), first, outputs=outputs)
    return FrozenTrunk(nn.Sequential(listener, MeanOverPositions()), boundary="the pooled features")


class _Part(nn.Module):
    """Some steps of a network, with its modules that they call under their own paths.

    Args:
        owner: The network.
        graphs: What to run in train mode (True) and in eval mode.
        constants: What holds the tensors that the forward makes of numbers.
    """

    def __init__(self, owner: nn.Module, graphs: Mapping[bool, fx.Graph], *, constants: nn.Module) -> None:
        super().__init__()
        targets = {str(node.target) for graph in graphs.values() for node in graph.nodes if _has_path(node)}
        for target in sorted(targets):  # a module comes before what it holds
            if hasattr(owner, target.partition(".")[0]):
                _copy_attr(owner, self, target)
            else:
                self.register_buffer(target, getattr(constants, target), persistent=False)
        # The generated code reads all it needs from `self`, so it is taken as a method. Which one to run is asked when
        # it runs: `training` is set in more ways than by `train()`.
        self.forwards: dict[bool, Callable[..., Any]] = {
            mode: type(fx.GraphModule(self, graph)).forward for mode, graph in graphs.items()
        }
        self.training = owner.training

    def forward(self, *inputs: Tensor) -> Any:
        return self.forwards[self.training](self, *inputs)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What the cut asks about a step of the network.

    `stages` are those whose tensors it uses, and `place` is the one that the module it calls is counted to, -1 for
    other steps. `value` is equal for the steps of both graphs that compute the same in eval mode. A step with
    `is_by_size` depends on the images by their size, if at all.
    """

    stages: frozenset[int]
    place: int
    value: int
    is_by_size: bool


@dataclass(frozen=True, kw_only=True)
class _Traced:
    """A network, its twin with the same tensors in other modules, and its graphs in train mode (True) and eval mode."""

    model: nn.Module
    twin: nn.Module
    stages: Sequence[Stage]
    graphs: Mapping[bool, fx.Graph]
    steps: Mapping[fx.Node, _Step]


class _StageTracer(NetworkTracer):
    """Takes each module that lies in one stage as one step."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = stages

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if find_stage_outputs(m):  # what it takes besides its input comes from elsewhere in the graph
            return isinstance(m, StageOutputs)
        return _place(self.stages, module_qualified_name) >= 0 or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, stages: Sequence[Stage]) -> _Traced:
    twin = twin_of(model)
    _, *options = inspect.signature(model.forward).parameters.values()
    defaults = {option.name: option.default for option in options if option.default is not option.empty}
    graphs: dict[bool, fx.Graph] = {}
    for mode in (True, False):
        twin.train(mode)  # a module that is pinned to eval mode stays there
        try:
            graphs[mode] = _StageTracer(stages).trace(twin, concrete_args=defaults or None)
        except Exception as error:  # whatever a forward raises when it computes with stand-ins for tensors
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ModelError(f"torch.fx cannot trace it: {reason}") from error
    steps = _describe(twin, stages, graphs)
    return _Traced(model=model, twin=twin, stages=stages, graphs=graphs, steps=steps)


def _describe(twin: nn.Module, stages: Sequence[Stage], graphs: Mapping[bool, fx.Graph]) -> dict[fx.Node, _Step]:
    stage_of = {id(tensor): i for i, stage in enumerate(stages) for tensor in stage_tensors(twin, stage).values()}
    values: dict[object, int] = {}
    steps: dict[fx.Node, _Step] = {}
    for graph in graphs.values():
        occurrences: Counter[object] = Counter()
        images, *_ = graph.nodes
        for node in graph.nodes:
            # Equal steps take equal inputs to the same function; the second of two in a graph is not the first.
            arguments = fx.map_arg((node.args, _in_eval(node)), lambda source: f"%{steps[source].value}")
            what = (node.op, _constant(twin, node) or node.target, repr(arguments))
            occurrences[what] += 1
            is_by_size = _is_size(node) or all(steps[source].is_by_size for source in node.all_input_nodes)
            steps[node] = _Step(
                stages=frozenset(stage_of[id(tensor)] for tensor in _tensors(twin, node) if id(tensor) in stage_of),
                place=_place(stages, str(node.target)) if _is_placed(twin, node) else -1,
                value=values.setdefault((what, occurrences[what]), len(values)),
                is_by_size=is_by_size and node is not images and node.op != "output",
            )
    return steps


def _split(traced: _Traced, count: int) -> tuple[_Part, _Part]:
    """Return the trunk of `count` stages, on the modules of the twin, and the rest, on those of the model."""
    steps, twin = traced.steps, traced.twin
    insides = {mode: _trunk_nodes(traced, mode, count) for mode in traced.graphs}
    outsides = {
        mode: [node for node in graph.nodes if node not in insides[mode] and not steps[node].is_by_size]
        for mode, graph in traced.graphs.items()
    }
    crossing = {
        steps[source].value: f"{source.name}_{steps[source].value}"  # one name may be two steps, one in either graph
        for mode, nodes in outsides.items()
        for source in chain.from_iterable(_sources(node, steps) for node in nodes)
        if source in insides[mode]
    }
    crossing = dict(sorted(crossing.items()))  # in the order of the network
    trunk = fx.Graph()
    copies: dict[int, fx.Node] = {}
    _copy(chain.from_iterable(insides.values()), trunk, copies, lambda node: steps[node].value)
    for node in trunk.nodes:
        node.kwargs = _in_eval(node)
    trunk.output(tuple(copies[value] for value in crossing))
    rests = {}
    for mode, nodes in outsides.items():
        rests[mode] = fx.Graph()
        inputs = {value: rests[mode].placeholder(name) for value, name in crossing.items()}
        given = {node: inputs[steps[node].value] for node in insides[mode] if steps[node].value in inputs}
        _copy(nodes, rests[mode], given, lambda node: node)
    return _Part(twin, {False: trunk}, constants=twin), _Part(traced.model, rests, constants=twin)


def _trunk_nodes(traced: _Traced, mode: bool, count: int) -> dict[fx.Node, None]:
    """Return the nodes of the graph that belong to a trunk of `count` stages, in order, less those by size.

    Raises:
        ModelError: A layer of the trunk needs the result of a layer of the rest.
    """
    graph, steps = traced.graphs[mode], traced.steps
    above = {graph.output_node()}
    for node in graph.nodes:
        if max(steps[node].stages, default=-1) >= count or not above.isdisjoint(node.all_input_nodes):
            above.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        stage = min(steps[node].stages, default=count)
        is_layer = stage < count and not steps[node].is_by_size
        if is_layer and node in above:
            raise ModelError(f"stage {traced.stages[stage].name} needs the result of a later one")
        if is_layer or not needed.isdisjoint(node.users):
            needed.add(node)
    in_other_mode = {steps[node].value for node in traced.graphs[not mode].nodes}
    inside: dict[fx.Node, None] = {}
    for node in graph.nodes:
        step = steps[node]
        joins = (
            node not in above
            and step.place < count
            and step.value in in_other_mode
            and "training" not in node.kwargs
            and all(source in inside or steps[source].is_by_size for source in node.all_input_nodes)
        )
        if not step.is_by_size and (node in needed or joins):
            inside[node] = None
    return inside


def _copy(
    nodes: Iterable[fx.Node], graph: fx.Graph, copies: dict[_Key, fx.Node], key: Callable[[fx.Node], _Key]
) -> None:
    """Copy `nodes` and what they take into `graph`, less what is in `copies` already."""

    def copied(node: fx.Node) -> fx.Node:
        if key(node) not in copies:
            copies[key(node)] = graph.node_copy(node, copied)
        return copies[key(node)]

    for node in nodes:
        copied(node)


def _split_at_output_layer(model: nn.Module) -> tuple[nn.Module, _Part]:
    """Return the network up to its output layer, and that layer with the modules behind it in its `Sequential`s."""
    heads = head_layers(model)
    if len(heads) != 1:
        raise ModelError(
            f"{type(model).__name__} cannot be cut: torch.fx cannot trace it and it has {len(heads)} output layers",
            "choose a model with one output layer",
        )
    paths = [heads[0]]
    parent, _, name = heads[0].rpartition(".")
    while parent and isinstance(model.get_submodule(parent), nn.Sequential):
        children = [child for child, _ in model.get_submodule(parent).named_children()]
        paths += [f"{parent}.{child}" for child in children[children.index(name) + 1 :]]
        parent, _, name = parent.rpartition(".")
    graph = fx.Graph()
    value = graph.placeholder("features")
    for path in paths:
        value = graph.call_module(path, (value,))
    graph.output(value)
    return Listener(twin_of(model), paths[0], paths[-1]), _Part(model, {True: graph, False: graph}, constants=model)


def _constant(twin: nn.Module, node: fx.Node) -> str:
    """Return what tells a tensor apart that the forward makes of numbers; nothing for other steps."""
    if node.op != "get_attr" or not str(node.target).startswith("_tensor_constant"):
        return ""
    tensor = getattr(twin, str(node.target))
    return f"{tensor.dtype} {tensor.tolist()}"


def _is_placed(twin: nn.Module, node: fx.Node) -> bool:
    """Tell whether the step belongs to a stage: so does each module but what puts the outputs of several together."""
    return node.op == "call_module" and not isinstance(twin.get_submodule(str(node.target)), StageOutputs)


def _sources(node: fx.Node, steps: Mapping[fx.Node, _Step]) -> Iterator[fx.Node]:
    """Yield the steps that `node` takes tensors from, or the size of tensors."""
    for source in node.all_input_nodes:
        if steps[source].is_by_size:
            yield from _sources(source, steps)
        else:
            yield source


def _tensors(owner: nn.Module, node: fx.Node) -> list[Tensor]:
    """Return the parameters and buffers that the step uses."""
    if not _has_path(node):
        return []
    value = operator.attrgetter(str(node.target))(owner)
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]


def _has_path(node: fx.Node) -> bool:
    return node.op in ("call_module", "get_attr")


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    return node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES


def _in_eval(node: fx.Node) -> dict[str, Any]:
    """Return the keyword arguments of the step as in eval mode: functional dropouts take `training`."""
    return {**node.kwargs, "training": False} if "training" in node.kwargs else dict(node.kwargs)


def _place(stages: Sequence[Stage], path: str) -> int:
    """Return the stage in which the module at `path` lies as a whole, or -1."""
    for index, stage in enumerate(stages):
        if any(path == module or path.startswith(f"{module}.") for module in stage.modules):
            return index
    return -1
