"""The child of ``mc2 doctor``: self-checks of the components named, as one line of JSON."""

import json
import sys

from mc2_hpc.doctor import examine_here, to_json

print()  # whatever libraries write as they are imported stays on lines of its own
print(json.dumps(to_json(examine_here(sys.argv[1:], full=True))))
