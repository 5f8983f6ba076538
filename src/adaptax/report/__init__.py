"""Plots and tables of what was learned: Matplotlib figures, and tables for Rich, CSV and LaTeX."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
