"""Each form of the three contractions of a convolution, for the layers of the papers' networks.

Inside a loop, as a meta-step has them, on one core and in float32; milliseconds a call, medians.
`adaptax.conv_forms` chooses by these.

    python benchmarks/conv_forms.py --json benchmarks/results/conv_forms.json
"""

import argparse
import functools
import os
import time

import measure
import numpy as np

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
).strip()

import jax
import jax.numpy as jnp
from jax import lax

from adaptax import conv_forms as forms

LAYERS = [  # images, side, channels, filters, stride
    (75, 84, 3, 32, 1), (75, 42, 32, 32, 1), (75, 21, 32, 32, 1), (75, 10, 32, 32, 1),
    (5, 84, 3, 32, 1), (5, 42, 32, 32, 1), (5, 21, 32, 32, 1), (5, 10, 32, 32, 1),
    (75, 28, 1, 64, 2), (75, 14, 64, 64, 2), (75, 7, 64, 64, 2), (75, 4, 64, 64, 2),
    (5, 28, 1, 64, 2), (5, 14, 64, 64, 2), (5, 7, 64, 64, 2), (5, 4, 64, 64, 2),
    (25, 28, 1, 64, 1), (25, 14, 64, 64, 1), (25, 7, 64, 64, 1), (75, 21, 160, 160, 1),
]  # fmt: skip
FORMS = {
    "forward": ("forward_native", "forward_windows"),
    "to_input": ("to_input_mirrored", "to_input_windows"),
    "to_kernel": ("to_kernel_split", "to_kernel_planes", "to_kernel_windows"),
}
PLAIN = {"to_input_mirrored", "to_kernel_split", "to_kernel_planes"}
TURNS = 4


def operands(n, side, c, out, stride):
    """Images, kernels and cotangents of every turn, and the geometry."""
    pads = lax.padtype_to_pads((side, side), (3, 3), (stride, stride), "SAME")
    g = forms.Geometry((side, side), (3, 3), (stride, stride), tuple(pads), (1, 1))
    rng = np.random.default_rng(0)
    shapes = ((n, side, side, c), (3, 3, c, out), (n, *g.outsize, out))
    return g, [jnp.asarray(rng.normal(size=(TURNS, *s)), jnp.float32) for s in shapes]


def milliseconds(function, given, repeats):
    """Of one turn of a loop; what it returns is summed, so that all of it is computed."""
    run = jax.jit(lambda given: lax.map(lambda each: function(*each).sum(), given))
    jax.block_until_ready(run(given))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(given))
        found.append(time.perf_counter() - start)
    return float(np.median(found)) / TURNS * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", help="which of the list")
    args = parser.parse_args()
    chosen = LAYERS if args.layers is None else [LAYERS[i] for i in args.layers]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = []
    for layer in chosen:
        g, (x, kernel, y) = operands(*layer)
        pairs = {"forward": (x, kernel), "to_input": (kernel, y), "to_kernel": (x, y)}
        work = 2e-9 * np.prod(y.shape[1:]) * 9 * layer[2]
        found = {}
        for name, kinds in FORMS.items():
            for kind in kinds:
                form = getattr(forms, kind, None)
                if form is not None and (kind not in PLAIN or g.plain):
                    each = functools.partial(form, geometry=g)
                    found[kind] = milliseconds(each, pairs[name], args.repeats)
            of = {kind: found[kind] for kind in kinds if kind in found}
            taken = min(of, key=of.get)
            times = ", ".join(f"{kind.rpartition('_')[2]} {ms:.2f}" for kind, ms in of.items())
            print(f"{layer} {name}: {work / of[taken] * 1e3:.0f} GFLOP/s; ms {times}", flush=True)
        results.append({"layer": layer, "gflop": float(work), "milliseconds": found})
    if args.json:
        measure.save(args.json, results=results)


if __name__ == "__main__":
    main()
