"""PyTorch modules as models, and adapted models as PyTorch modules.

The module's own `forward` runs on JAX arrays (by torchax), so it is compiled, mapped over tasks
and differentiated twice like any other model. PyTorch itself is needed to trace it, not to run it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .. import tree
from ..learner import Functional

KEY = "random.key"
"""Where a model keeps its key: a name that no submodule can have."""

_drawing: ContextVar[Any] = ContextVar("drawing", default=None)


def from_torch(
    module: Any, *, channels_last: bool = True, key: PRNGKeyArray | None = None
) -> Functional:
    """Make a model of a PyTorch module, with the module's parameters.

    The parameters are nested by the names of the submodules, so the paths that learners know are
    `"params/conv1/weight"`: `adaptax.ANIL(loss, head="params/fc")` adapts the layer `fc`. What
    is trained are the floating-point parameters that require a gradient, tied ones once, under the
    first of their names; frozen parameters, buffers and other tensors are constants. The module is
    copied, and not changed.

    Some layers behave differently in training and evaluation. Here every layer has one behaviour,
    a pure function of parameters and inputs:

    * Batch (and instance) normalisation uses the statistics of the batch it is given, always, as
      the papers of the family do; running averages are neither used nor updated. Like all else,
      its scale and shift are adapted: leave them out with `adapt_only=`.
    * Everything else is in evaluation mode: dropout is off. With a `key` it is in the mode that
      the module is in, and what is random, such as dropout, draws anew at every pass of training.
    * Without a key, a `forward` that draws random numbers all the same is an error.

    Args:
        module: a `torch.nn.Module`. It is called with the batch's `x`, or with keyword arguments
            if that is a dictionary. Floats in `x` take the type of the parameters.
        channels_last: the images it is given are `(n, h, w, c)`, as tasks have them, and are
            handed to the module as PyTorch's `(n, c, h, w)`. Only arrays of four dimensions are
            images. `False` hands over arrays as they are.
        key: of what is random in the module, such as dropout; see above.

    Raises:
        ImportError: without torch and torchax.
        TypeError: if `module` is not a `torch.nn.Module`.
        ValueError: if it has nothing to train, or layers (such as weight-normalised ones) whose
            weights are computed, by parametrization or a hook, and are not parameters.

    Example:
        `model = adaptax.from_torch(torch.nn.Sequential(...))`
    """
    torch, torchax = _import()
    twin = _one_behaviour(module, key is not None)
    state, forward = torchax.extract_jax(twin, _environment())
    trained = {
        name
        for name, p in twin.named_parameters(remove_duplicate=False)
        if p.requires_grad and p.is_floating_point()
    }
    params = {name: array for name, array in state.items() if name in trained}
    fixed = {name: array for name, array in state.items() if name not in trained}
    if not params:
        raise ValueError(
            f"{type(module).__name__} has no floating-point parameter that requires a gradient, "
            "so there is nothing to meta-learn; call module.requires_grad_(True)"
        )

    def apply(params: PyTree, x: PyTree) -> PyTree:
        flat = dict(_flatten(params))
        token = _drawing.set([flat.pop(KEY, None)])
        dtype = jnp.result_type(*flat.values())

        def enter(leaf: Any) -> Any:
            leaf = jnp.asarray(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                leaf = leaf.astype(dtype)
            return jnp.moveaxis(leaf, -1, 1) if channels_last and leaf.ndim == 4 else leaf

        x = jax.tree.map(enter, x)
        args, kwargs = ((), x) if isinstance(x, Mapping) else ((x,), {})
        try:
            with _no_fast_path(torch):
                return forward({**fixed, **flat}, args, kwargs)
        finally:
            _drawing.reset(token)

    random = {} if key is None else {KEY: key}
    return Functional(_nest(params) | random, apply, tree.every)


def to_torch(adapted: Functional, module: Any) -> Any:
    """Copy a PyTorch module and write the parameters of an adapted model into it.

    Buffers, frozen parameters and the training mode stay those of `module`. In evaluation mode
    its batch normalisation uses the running averages it had: call `.train()` on these layers for
    the statistics of the batch, with which the parameters were meta-trained.

    Args:
        adapted: from `from_torch(module)`, meta-trained or adapted.
        module: the module that it was made from, or one like it.

    Raises:
        ImportError: without torch and torchax.
        TypeError: if `adapted` is not a model of `from_torch`.
        ValueError: if parameters are absent or differ in shape.
    """
    torch, _ = _import()
    if not isinstance(adapted, Functional) or not isinstance(adapted.params, Mapping):
        raise TypeError(
            f"to_torch was given a {type(adapted).__name__}; it takes what from_torch and the "
            "learners' adapt return. Of an Ensemble, take one model: ensemble.member(0)"
        )
    twin = copy.deepcopy(module)
    targets = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, array in _flatten(adapted.params):
            if name == KEY:
                continue
            shape = tuple(targets[name].shape) if name in targets else "no such parameter"
            if shape != array.shape:
                raise ValueError(
                    f"the model has {name} of shape {array.shape}, and the module has {shape}; "
                    "give to_torch the module that the model was made from, and a single model"
                )
            # PyTorch cannot read NumPy's bfloat16; float32 holds it exactly.
            wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
            targets[name].copy_(torch.from_numpy(np.array(wide)))
    return twin


def _one_behaviour(module: Any, random: bool) -> Any:
    """Copy a module; its layers behave alike in training and evaluation, but for what is random."""
    torch, _ = _import()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"from_torch takes a torch.nn.Module, not a {type(module).__name__}")
    for name, layer in module.named_modules():
        for hook in layer._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                raise ValueError(
                    f"the layer {name or 'itself'!r} computes its weight in a hook, "
                    f"{type(hook).__name__}, so that it is not a parameter; remove it first, as "
                    "torch.nn.utils.remove_weight_norm does"
                )
    twin = copy.deepcopy(module)
    twin = twin if random else twin.eval()
    for name, layer in twin.named_modules():
        if torch.nn.utils.parametrize.is_parametrized(layer):
            raise ValueError(
                f"the layer {name or 'itself'!r} is parametrized, so its weight is computed, not "
                "a parameter; call torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
        if isinstance(layer, torch.nn.modules.batchnorm._NormBase):
            layer.track_running_stats = False
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                setattr(layer, buffer, None)
    return twin


def _import() -> tuple[Any, Any]:
    """Import torch and torchax, without the settings that importing torchax leaves behind."""
    try:
        import torch

        if "torchax" in sys.modules:
            import torchax
        else:
            enabled = torch.backends.mha.get_fastpath_enabled()
            import torchax

            torch.backends.mha.set_fastpath_enabled(enabled)
    except ImportError as error:
        raise ImportError(
            f"PyTorch modules need torch and torchax ({error}): pip install adaptax[torch]"
        ) from error
    return torch, torchax


@contextmanager
def _no_fast_path(torch: Any) -> Iterator[None]:
    """Switch PyTorch's fused attention off, which has no derivative."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@functools.cache
def _environment() -> Any:
    """Return torchax's environment: our own, so that no random state or setting is touched."""
    _import()
    from torchax import tensor

    class Environment(tensor.Environment):  # type: ignore[misc, unused-ignore]
        def get_and_rotate_prng_key(self, generator: Any = None) -> Any:
            drawing = _drawing.get()
            if drawing is None or drawing[0] is None:
                raise ValueError(
                    "the module draws random numbers in its forward, but a model is a pure "
                    "function of its parameters and inputs; give functional dropout "
                    "training=self.training, or from_torch a key="
                )
            drawing[0], key = jax.random.split(drawing[0])
            return key

    return Environment()


def _flatten(params: PyTree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return arrays with the names that PyTorch gives them."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nest(params: dict[str, Any]) -> dict[str, Any]:
    """Return the inverse of `_flatten`."""
    nested: dict[str, Any] = {}
    for name, value in params.items():
        *modules, last = name.split(".")
        at = nested
        for part in modules:
            at = at.setdefault(part, {})
        at[last] = value
    return nested
