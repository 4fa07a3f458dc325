"""Print what an image's part of nbgpu requires, so that it lies in a layer of its own that changes with pyproject.toml alone."""

import pathlib
import sys

import tomllib

project = tomllib.loads((pathlib.Path(__file__).parent / "pyproject.toml").read_text())["project"]
print(*project["dependencies"], *(one for extra in sys.argv[1:] for one in project["optional-dependencies"][extra]), sep="\n")
