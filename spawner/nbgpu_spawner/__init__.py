"""The hub side: GPUSliceMixin and the spawners."""
