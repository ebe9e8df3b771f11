"""When an operator's function is called straight, and that it then gives what the operator gives."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saccade.ops import attend, block_attend, decode_attend, gather_attend
from saccade.ops.block_attend import op as block_operator
from saccade.ops.gather_attend import boxes as boxes_operator
from saccade.ops.gather_attend import operator as gather_operator
from saccade.ops.straight import is_plain
from saccade.types import BlockLayout, Boxes, KVPages, TokenIndex

pytestmark = pytest.mark.quick


class Names(TorchDispatchMode):
    """Writes down which operators are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    pass


def test_tensors_and_parameters_without_onlookers_are_plain():
    learned = torch.nn.Parameter(torch.ones(2))
    assert is_plain(torch.ones(2), None, 3, "cpu", torch.tensor([1]))
    assert not is_plain(torch.ones(2), learned)
    with torch.no_grad():
        assert is_plain(torch.ones(2), learned)
    with torch.inference_mode():
        assert is_plain(torch.ones(2), learned)


def test_subclasses_and_meta_tensors_are_not_plain():
    assert not is_plain(torch.ones(2), torch.ones(2).as_subclass(Own))
    assert not is_plain(torch.ones(2, device="meta"))


@pytest.mark.parametrize("onlooker", [Names, Functions, torch.profiler.profile])
def test_modes_and_the_profiler_are_seen(onlooker):
    x = torch.ones(2)
    with onlooker():
        assert not is_plain(x)
    assert is_plain(x)


def test_transforms_and_tracers_are_seen():
    seen = []

    def look(x):
        seen.append(is_plain(x))
        return x * 2

    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(look)(torch.ones(2))
    assert seen == [False] * 4
    assert torch.compile(lambda x: x + is_plain(x), backend="eager", fullgraph=True)(torch.zeros(1)) == 0
    assert is_plain(torch.ones(2))


def calls():
    """Name of the operator, and a call of the engine."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 36, 16), torch.randn(1, 2, 36, 16), torch.randn(1, 2, 36, 16)
    index = TokenIndex(torch.arange(36 * 5).view(1, 1, 36, 5) % 36, 36, 36)
    window = torch.arange(6).clamp(1, 4).repeat(2).int()
    boxes = Boxes(window - 1, window + 1, (6, 6), (1, 1))
    layout = BlockLayout.from_dense(torch.ones(36, 36, dtype=torch.bool).tril(), block=12)
    pages = KVPages.from_dense(k, v, page_size=8)
    return {
        "saccade::attend": lambda impl: attend(q, k, v, causal=True, impl=impl),
        "saccade::block_attend": lambda impl: block_attend(q, k, v, layout, impl=impl),
        "saccade::gather_attend": lambda impl: gather_attend(q, k, v, index, impl=impl),
        "saccade::boxes_attend": lambda impl: gather_attend(q, k, v, boxes, impl=impl),
        "saccade::decode_attend": lambda impl: decode_attend(q[:, :, -2:], pages, impl=impl),
    }


@pytest.mark.parametrize("impl", ["auto", "eager"])
@pytest.mark.parametrize("name", calls())
def test_engines_give_the_same_bits_straight_and_through_the_operator(name, impl):
    call = calls()[name]
    with Names() as names:
        watched = call(impl)
    assert any(seen.startswith(name) for seen in names.seen)
    assert torch.equal(call(impl), watched)


def refuse(*args):
    raise AssertionError("through the operator")


@pytest.mark.parametrize(
    ("name", "module", "attribute"),
    [
        ("saccade::block_attend", block_operator, "forward_op"),
        ("saccade::gather_attend", gather_operator, "gather_attend_op"),
        ("saccade::boxes_attend", boxes_operator, "boxes_attend_op"),
    ],
)
def test_a_plain_call_does_not_go_through_the_operator(name, module, attribute, monkeypatch):
    monkeypatch.setattr(module, attribute, refuse)
    call = calls()[name]
    call("auto")
    with Names(), pytest.raises(AssertionError, match="through the operator"):
        call("auto")
