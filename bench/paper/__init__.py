"""The paper's tables at small scale: `python -m bench.paper main` (or stages, settings, variants, agents, all).

Every model is trained from several seeds on a laptop-sized problem and measured in the same way: training cost in
counted MACs, pruning and calibration included; held-out loss by group at fixed noise; Fréchet distance of samples.
"""
