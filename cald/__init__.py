__version__ = "0.1.0"

import sys as _sys
import warnings as _warnings
from importlib.util import find_spec as _find_spec
from pathlib import PurePath as _PurePath

# tqdm recommends ipywidgets in every notebook; cald's progress bars do not need them.
_warnings.filterwarnings('ignore', message='IProgress not found')

# The command line reads its arguments first: loading torch and transformers takes seconds.
_script = (_sys.argv or [''])[0]
_is_command = _script=='-m' or _PurePath(_script).stem=='cald'

# The Auto classes of transformers know converted models once this has run.
if not _is_command and _find_spec('torch') and _find_spec('transformers'):
    from . import families,models
