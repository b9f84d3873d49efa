"""The command line: parse, build one object, call one function, print. One file a command."""
