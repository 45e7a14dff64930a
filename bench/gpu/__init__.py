"""The operators and whole UNets on this machine's GPU against their peers: `python -m bench.gpu --help`."""
