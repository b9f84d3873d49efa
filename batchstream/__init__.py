"""Stream prompt files through OpenAI-compatible endpoints and keep every answer."""
