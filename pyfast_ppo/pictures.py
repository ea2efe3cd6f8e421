"""What all pictures have in common; for matplotlib, which is not needed to import this."""

from typing import Any

GREY = "#d0d7de"  # of grids, and of what stays in the background
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}  # of matplotlib.rc_context
