"""Scripts that measure. They import each other by their names, run as a file (`python benchmarks/NAME.py`) or as a
module of this package (`python -m benchmarks.NAME`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
