"""The fixtures of these tests; what they stand on is in `browser_hub`."""

from browser_hub import chromium, hub

__all__ = ["chromium", "hub"]
