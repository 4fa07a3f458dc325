"""On a real slice: what a program sees of it as numbers, what `%gpu` says, and that memory of a killed kernel is said to be free."""

from __future__ import annotations

import json
import shutil

import pytest
from test_lab_slice import GIB, LIBRARIES, Server, cells, wait_for
from test_lab_slice import server as server  # a fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LIBRARIES / "sim" / "libcuda.so.1").exists(), reason="C libraries not built: make setup"),
]
NUMBERS = """
import json, nbgpu
seen = nbgpu.slice()
print(json.dumps([seen.memory_limit_bytes, seen.memory_free_bytes, seen.devices[0].kernel.memory_used_bytes]))
"""


def test_a_program_sees_its_slice_and_a_killed_kernel_gives_it_back(server: Server) -> None:
    shutil.copy(server.base / "notebooks" / "fractions.ipynb", server.base / "notebooks" / "here.ipynb")
    kernel, code = server.open("here.ipynb"), cells()
    kernel.run(code["setup"])
    kernel.run("blocks = [check(driver.cuMemAlloc(1024**3)) for _ in range(4)]")
    limit, free, held = json.loads(kernel.run(NUMBERS))
    assert limit == server.usage()["devices"][0]["memory_limit_bytes"]
    wait_for("the server says the same", lambda: server.usage()["devices"][0]["memory_used_bytes"] == limit - free, 5)
    assert 4 * GIB <= held < 5 * GIB
    said = kernel.run("get_ipython().run_line_magic('gpu', ''); print(get_ipython().find_line_magic('gpu').__module__)")
    assert said == "nbgpu_lab.magic\n"

    def seen() -> bool:
        """Whether the agent, which looks once a second, has seen what the kernel holds."""
        (device,) = server.call("nbgpu/api/history?seconds=5")["devices"].values()
        return device["memory_used_bytes"][-1] >= held

    wait_for("a look of the agent", seen, 10)
    before = server.usage()["last_event"]
    kernel.client.execute("import os; os.kill(os.getpid(), 9)")

    def ended() -> object:  # no page looks at the slice: the agent does
        return [one for one in server.call(f"nbgpu/api/events?after={before}") if one["kind"] == "kernel-ended"]

    (notice,) = wait_for("the notice", ended, 20)
    assert (notice["name"], notice["data"]["freed_bytes"]) == ("here.ipynb", held)
    assert notice["message"].startswith("here.ipynb ended: the 4")
    wait_for("it holds nothing", lambda: server.kernel(kernel.id)["devices"] == [], 5)
