"""`python -m yeonma` is `yeonma`."""

import sys

from yeonma.cli import main

sys.exit(main())
