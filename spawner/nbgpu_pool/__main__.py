"""`python -m nbgpu_pool`."""

import sys

from .main import main

sys.exit(main())
