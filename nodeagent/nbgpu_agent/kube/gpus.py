"""What a container needs to use a GPU: of a real one NVIDIA's files and devices, of a simulated one nothing but what each claim brings."""

from __future__ import annotations

from typing import Any

from nbgpu.models import Device

Json = dict[str, Any]


class Gpus:
    """Knows how containers get at the GPUs of this node."""

    def container_gets(self, device: Device) -> tuple[tuple[str, ...], Json]:
        """Return (other drivers' CDI devices, edits of our own) by which a container gets a device."""
        return (), {}
