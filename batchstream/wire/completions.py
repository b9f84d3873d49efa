"""Completions: the same chunks as chat, with `text` in place of `delta`; see `chat.ChoicesAssembler`."""
