"""The pool and config of the training tests, for jobs that train."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("training_fixtures", Path(__file__).parents[1] / "training/conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
tiny_pool = _module.tiny_pool
module_config = _module.module_config
