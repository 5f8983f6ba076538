"""Meta-learning of the MAML family in JAX: short, faithful, fast.

The public names are in `__init__.pyi`. Each is imported when it is asked for, so that
`adaptax --help` loads no JAX.
"""

import lazy_loader

from . import process as process  # at once: it has to see forks that come before the first use

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
