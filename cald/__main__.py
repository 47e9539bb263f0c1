"`python -m cald` is the command `cald`"
import sys

from cald.cli.main import main

sys.exit(main())
