"""What a training run is on disk, and how it is read.

Every file of weights is read through `weights`. The files of this folder:

    options      every option, in the sections of `--help`
    config       TrainConfig: the options as one checked description
    directory    RunDirectory: the paths and small JSON files of a run
    lock         one writer at a time
    processes    which commands are one process, and which run under torchrun
    build        device, data, diffusion process and network that a configuration describes
    groups       the timestep groups of a run
    widths       the width plan of a run, committed together with its cost
    opening      the directory of a configuration: a new run, or one that is continued
    checkpoint   names of the files of a checkpoint; writing, finding and choosing checkpoints
    weights      reading files of weights, checked against their checksums and the model's flags
    averages     how much of its starting weights a moving average still holds
    unet_flags   the flags that can be read off a state dict, so that errors can name them
    loading      Run: a run directory opened for reading, and its models
    denoisers    a run or a file of weights as a denoiser to sample from
"""
