"""Stream prompt files through OpenAI-compatible endpoints and keep every answer."""

from __future__ import annotations

__version__ = "0.1.0"
