"""Numbers: durations, percentiles, summaries, evidence. Pure: no clock, no chance, no I/O."""
