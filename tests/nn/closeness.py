"""Compare the gradients of two networks, parameter by parameter."""

from torch import Tensor, nn


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want|, of a tensor that is not zero."""
    assert want.norm() > 0
    return ((got - want).norm() / want.norm()).item()


def assert_same_gradients(got: nn.Module, want: nn.Module, limit: float = 0.02) -> None:
    """Compare each parameter alone: among all parameters, a wrong gradient of a norm's few weights would not show.

    A relative error of 0.02 means a cosine similarity above 0.999 and norms that agree within 2 %.
    """
    expected = dict(want.named_parameters())
    found = dict(got.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        grad, wanted = found[name].grad, parameter.grad
        assert grad is not None, name
        assert wanted is not None, name
        error = relative_error(grad, wanted)
        assert error < limit, f"{name}: relative error {error:.3g}"
