"""``python -m mc2_hpc.cli``: what launchers start, so that the same Python runs every rank."""

import sys

from mc2_hpc.cli import main

sys.exit(main())
