"""What a training run is on disk, and how it is read.

Every file of weights is read through `weights`. The files of this folder:

    options      every option, in the sections of `--help`
    config       TrainConfig: the options as one checked description
    directory    RunDirectory: the paths and small JSON files of a run
    build        device, data, diffusion process and network that a configuration describes
    groups       the timestep groups of a run
    opening      the directory of a configuration: a new run, or one that is continued
    checkpoint   names of the files of a checkpoint; writing, finding and choosing checkpoints
    weights      reading files of weights, checked against their checksums and the model's flags
    unet_flags   the flags that can be read off a state dict, so that errors can name them
    loading      Run: a run directory opened for reading, and its models
    denoisers    a run or a file of weights as a denoiser to sample from
"""
