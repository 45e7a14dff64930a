"""Throughput suites: ours against its peers, interleaved in one run; `python -m bench --help`."""
