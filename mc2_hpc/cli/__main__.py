"""``python -m mc2_hpc.cli``: used by launchers, so that every rank runs the same Python."""

import sys

from mc2_hpc.cli import main

sys.exit(main())
