"""Set everything up: `python3 tools/setup.py [run|test|lint]`. Standard library only; the Makefile calls it.

This file is only the door: it must be readable by any Python, so that a wrong one gets a sentence and not a SyntaxError.
"""

import os
import sys

if sys.version_info < (3, 10):
    found = [name for name in ("python3.14", "python3.13", "python3.12", "python3.11", "python3.10")
             if any(os.access(os.path.join(part, name), os.X_OK) for part in os.environ.get("PATH", "").split(os.pathsep))]  # fmt: skip
    here = ".".join(str(number) for number in sys.version_info[:3])
    advice = "run: make run PYTHON=" + found[0] if found else "install one (Debian 12, Ubuntu 22.04 and later have it)"
    sys.exit("nbgpu needs Python 3.10 or newer, but " + sys.executable + " is " + here + ": " + advice + ".")

from setup_steps import main

sys.exit(main(sys.argv[1:]))
