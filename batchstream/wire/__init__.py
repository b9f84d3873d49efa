"""Bytes to meaning and back, for four streaming APIs. Pure: no input or output, clock and chance are arguments.

`reception.Reception` is the door for the transport; the other modules are its parts.
"""
