"""``python -m nbgpu`` is the command ``nbgpu``."""

from .cli import main

main()
