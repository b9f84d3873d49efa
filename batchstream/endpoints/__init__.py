"""Things to talk to: the providers we know, a real model on this machine, a simulated endpoint."""
