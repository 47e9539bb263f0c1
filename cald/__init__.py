__version__ = "0.1.0"

from importlib.util import find_spec as _find_spec

# The Auto classes of transformers know converted models once this has run.
if _find_spec('torch') and _find_spec('transformers'): from . import families,models
