__version__ = "0.1.0"

import warnings as _warnings
from importlib.util import find_spec as _find_spec

# tqdm recommends ipywidgets in every notebook; cald's progress bars do not need them.
_warnings.filterwarnings('ignore', message='IProgress not found')

# The Auto classes of transformers know converted models once this has run.
if _find_spec('torch') and _find_spec('transformers'):
    from . import families,models
