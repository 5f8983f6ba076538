"""Named recipes: one for each cell of the papers' tables, and short versions for a CPU.

The names are in `__init__.pyi`, and imported when they are asked for: the table of learners and
task families needs no JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
