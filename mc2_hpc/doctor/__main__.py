"""The child process of ``mc2 doctor``: runs the self-checks of the given components and prints one line of JSON."""

import json
import sys

from mc2_hpc.doctor import examine_here, to_json

print()  # keeps whatever libraries print on import on a separate line
print(json.dumps(to_json(examine_here(sys.argv[1:], full=True))))
