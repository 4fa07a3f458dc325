"""Asks the driver for every function that the limiter stands in for, and for all that CUDA's runtimes ask for; prints JSON.

``python -S resolution_probe.py FUNCTIONS_H REQUESTS...``; run without and with the limiter.
"""

from __future__ import annotations

import ctypes as c
import json
import re
import sys
from pathlib import Path
from typing import Any

PER_THREAD = 2


class Info(c.Structure):
    """dladdr's answer."""

    _fields_ = [("file", c.c_char_p), ("base", c.c_void_p), ("name", c.c_char_p), ("address", c.c_void_p)]


def hooks(text: str) -> list[tuple[str, str, int, int]]:
    """Return (exported name, name asked for, version, per-thread stream?) of each CUDA function that the limiter stands in for."""
    lines: list[str] = []
    skipping = False
    for line in text.splitlines():
        define = line.lstrip().startswith("#define") or skipping
        skipping = define and line.rstrip().endswith("\\")
        if not define:
            lines.append(line)
    plain = "\n".join(lines)
    found = [
        (name, base, int(since), int(ptsz))
        for name, base, since, ptsz in re.findall(r"HOOK\(CUDA,\s*CUresult,\s*(\w+),[^;\"]*?\"(\w+)\",\s*(\d+),\s*(\d)\)", plain)
    ]
    for name, since, since_ptsz in re.findall(r"STREAM_PAIR\((\w+),[^;]*?,\s*(\d+),\s*(\d+)\)", plain):
        found += [(name, name, int(since), 0), (name + "_ptsz", name, int(since_ptsz), 1)]
    return found


class Driver:
    """libcuda and who exports what."""

    def __init__(self) -> None:
        self.lib = c.CDLL("libcuda.so.1")
        self.libc = c.CDLL(None)
        self.libc.dladdr.argtypes = [c.c_void_p, c.POINTER(Info)]
        self.init = int(self.lib.cuInit(0))
        version = c.c_int()
        self.lib.cuDriverGetVersion(c.byref(version))
        self.version = version.value

    def exported(self, name: str) -> int | None:
        """Return the address that dlsym gives."""
        function = getattr(self.lib, name, None)
        return None if function is None else int(c.cast(function, c.c_void_p).value or 0)

    def asked(self, name: str, version: int, flags: int) -> tuple[int, int, int]:
        """Return (CUresult, address, status) of cuGetProcAddress."""
        pointer, status = c.c_void_p(), c.c_int(-1)
        code = self.lib.cuGetProcAddress_v2(name.encode(), c.byref(pointer), version, c.c_uint64(flags), c.byref(status))
        return int(code), int(pointer.value or 0), status.value

    def where(self, address: int) -> tuple[str, str, bool]:
        """Return (library, nearest exported name, whether the address is that function's)."""
        info = Info()
        if not address or not self.libc.dladdr(address, c.byref(info)):
            return "", "", False
        return (info.file or b"").decode(), (info.name or b"").decode(), info.address == address


def main(arguments: list[str]) -> None:
    """Ask, print."""
    driver = Driver()
    found: dict[str, Any] = {"init": driver.init, "version": driver.version, "hooks": [], "requests": []}
    for name, base, since, ptsz in hooks(Path(arguments[0]).read_text()):
        address = driver.exported(name)
        entry: dict[str, Any] = {"name": name, "exported": address is not None}
        if since <= driver.version:
            code, pointer, status = driver.asked(base, since, PER_THREAD if ptsz else 0)
            library, nearest, exact = driver.where(pointer)
            entry |= {"asked": base, "version": since, "flags": PER_THREAD if ptsz else 0, "code": code, "status": status}
            entry |= {"same": pointer == address and pointer != 0, "got": bool(pointer), "by": nearest if exact else "", "in": library}
        found["hooks"].append(entry)
    for path in arguments[1:]:
        for line in Path(path).read_text().splitlines():
            words = line.split()
            if len(words) != 3 or int(words[1][1:]) > driver.version:
                continue
            code, pointer, _ = driver.asked(words[0], int(words[1][1:]), int(words[2][1:]))
            library, nearest, exact = driver.where(pointer)
            found["requests"].append([words[0], int(words[1][1:]), int(words[2][1:]), code, nearest if exact else "", library])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
