"""Try an installation: imports, `adaptax --help`, the README's first block, two contracts.

python .ci/smoke.py [README.md]; run outside of the source tree it tests what is installed.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

readme = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "README.md"
block = re.search(r"^```python\n(.*?)^```", readme.read_text(), re.M | re.S).group(1)

start = time.process_time()
done = subprocess.run(
    [sys.executable, "-m", "adaptax", "--help"], capture_output=True, text=True, check=True
)
assert "train" in done.stdout, done.stdout

import adaptax as ax  # noqa: E402

for name in ax.__all__:
    getattr(ax, name)

exec(compile(block, str(readme), "exec"), {"__name__": "__main__"})

ax.testing.check_learner(ax.MAML(ax.losses.mse))
ax.testing.check_learner(ax.MAMLPlusPlus(ax.losses.mse))

import equinox  # noqa: E402
import jax  # noqa: E402
import optax  # noqa: E402

print(
    f"adaptax {ax.__version__} in {Path(ax.__file__).parent} works:",
    f"Python {sys.version.split()[0]}, jax {jax.__version__}, equinox {equinox.__version__},",
    f"optax {optax.__version__}; {time.process_time() - start:.0f} s of processor",
)
