"""The backward pass does not overwrite a gradient that a hook, a caller or another part of the graph holds."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import dyadic
from torch import Tensor

from multifire import ops
from multifire.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.is_built(), reason=cpu.NOT_BUILT)
SHAPE = (3, 2, 5, 4, 4)


class Holder:
    """Gradients, or their storages, that a test keeps, and the values that they must still have at the end."""

    def __init__(self):
        self.held: list[tuple[Tensor, Tensor]] = []
        self.storages: list[tuple[Any, Tensor]] = []

    def hold(self, grad: Tensor) -> None:
        self.held.append((grad, grad.clone()))

    def all_held(self) -> list[tuple[Tensor, Tensor]]:
        from_storages = [
            (torch.empty(0).set_(s, 0, expected.shape, expected.stride()), expected) for s, expected in self.storages
        ]
        return self.held + from_storages


def hook_keeps_the_gradient(out, holder):
    out.register_hook(holder.hold)
    return out


def hook_keeps_a_view_of_the_gradient(out, holder):
    out.register_hook(lambda grad: holder.hold(grad.flatten()))
    return out


def hook_keeps_the_storage(out, holder):
    out.register_hook(lambda grad: holder.storages.append((grad.untyped_storage(), grad.clone())))
    return out


def hook_of_the_flattened_output_keeps_the_storage(out, holder):
    flat = out.flatten(0, 1)
    flat.register_hook(lambda grad: holder.storages.append((grad.untyped_storage(), grad.clone())))
    return flat


def hook_shares_the_storage_with_another_process(out, holder):
    def share_storage(grad: Tensor) -> None:
        handle = grad.untyped_storage()._share_filename_cpu_()
        holder.storages.append((torch.UntypedStorage._new_shared_filename_cpu(*handle), grad.clone()))

    out.register_hook(share_storage)
    return out


def hook_of_the_flattened_output_keeps_the_gradient(out, holder):
    flat = out.flatten(0, 1)
    flat.register_hook(holder.hold)
    return flat


def hook_returns_another_gradient(out, holder):
    ones = torch.ones(SHAPE)
    holder.hold(ones)
    out.register_hook(lambda grad: ones)
    return out


def hook_returns_a_view_of_another_tensor(out, holder):
    ones = torch.ones(SHAPE).flatten()
    holder.hold(ones)
    out.register_hook(lambda grad: ones.view(SHAPE))
    return out


def hook_returns_the_memory_of_a_numpy_array(out, holder):
    ones = np.ones(SHAPE, np.float32)
    holder.hold(torch.from_numpy(ones))
    out.register_hook(lambda grad: torch.from_numpy(ones))
    return out


def node_hook_reads_the_gradient_afterwards(out, holder):
    expected = 2 * out.detach()
    out.grad_fn.register_hook(lambda _, grads: holder.held.append((grads[0].clone(), expected)))
    return out


def node_prehook_keeps_the_gradient(out, holder):
    out.grad_fn.register_prehook(lambda grads: holder.hold(grads[0]))
    return out


def output_retains_its_gradient(out, holder):
    out.retain_grad()
    holder.held.append((out, 2 * out.detach()))
    return out


def output_is_added_to_another_tensor(out, holder):
    other = torch.zeros(SHAPE, requires_grad=True) * 1
    other.register_hook(holder.hold)
    return out + other


def output_is_added_to_a_leaf(out, holder):
    leaf = torch.zeros(SHAPE, requires_grad=True)
    holder.held.append((leaf, 2 * out.detach()))
    return leaf + out


def output_is_concatenated_with_another_tensor(out, holder):
    other = torch.ones(SHAPE, requires_grad=True) * 1
    other.register_hook(holder.hold)
    return torch.cat([other, out])


USES = [
    hook_keeps_the_gradient,
    hook_keeps_a_view_of_the_gradient,
    hook_of_the_flattened_output_keeps_the_gradient,
    hook_keeps_the_storage,
    hook_of_the_flattened_output_keeps_the_storage,
    hook_shares_the_storage_with_another_process,
    hook_returns_another_gradient,
    hook_returns_a_view_of_another_tensor,
    hook_returns_the_memory_of_a_numpy_array,
    node_hook_reads_the_gradient_afterwards,
    node_prehook_keeps_the_gradient,
    output_retains_its_gradient,
    output_is_added_to_another_tensor,
    output_is_added_to_a_leaf,
    output_is_concatenated_with_another_tensor,
]


def gradient(use, holder: Holder, backend: str) -> Tensor:
    torch.manual_seed(0)
    x = dyadic(*SHAPE).requires_grad_()
    out, _ = ops.mlf(x * 1, surrogate="atan", backend=backend)
    use(out, holder).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("use", USES)
def test_held_gradient_keeps_its_values(use):
    holder = Holder()
    got, want = gradient(use, holder, "cpu"), gradient(use, Holder(), "reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert holder.all_held()
    for held, expected in holder.all_held():
        assert torch.equal(held.grad if held.requires_grad else held, expected)


@pytest.mark.parametrize("how", ["asked for", "given", "given by another library"])
def test_gradient_of_the_caller_keeps_its_values(how):
    x = dyadic(*SHAPE).requires_grad_()
    out, _ = ops.mlf(x * 1, surrogate="atan", backend="cpu")
    if how == "asked for":
        held, _ = torch.autograd.grad(out.square().sum(), [out, x])
        expected = 2 * out.detach()
    else:
        memory = np.ones(SHAPE, np.float32)
        held, expected = torch.from_numpy(memory), torch.ones(SHAPE)
        out.backward(held if how == "given" else torch.from_numpy(memory))
    assert torch.equal(held, expected)


def test_retained_graph_gives_the_same_gradient_twice():
    x = dyadic(*SHAPE).requires_grad_()
    out, _ = ops.mlf(x * 1, surrogate="atan", backend="cpu")
    first, second = (torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
