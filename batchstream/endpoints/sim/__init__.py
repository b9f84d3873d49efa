"""The parts of the simulated endpoint (`batchstream.endpoints.simulate` puts them together).

http1      bytes to requests              settings  every setting, once
asks       a request body, understood     latency   how long things take
answers    what is answered               faultplan what goes wrong
dialects   how each API spells it         windows   rate limits
wheel      when the next byte goes out    ledger    what was asked and billed
"""
