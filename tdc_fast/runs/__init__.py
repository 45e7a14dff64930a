"""What a training run is on disk, and how it is read.

options      every option, in the sections of ``--help``
config       TrainConfig: the options as one checked description
directory    RunDirectory: the paths and small JSON files of a run
opening      the directory of a configuration: a new run, or one that is continued
build        device, data, diffusion process and network that a configuration describes
groups       the timestep groups of a run
checkpoint   names of the files of a checkpoint; writing, finding and choosing checkpoints
weights      reading files of weights, checked; everything that reads weights goes through it
unet_flags   the model flags that a state dict gives away, for errors that name the flag
loading      Run: a run directory opened for reading, and its models
denoisers    a run or a file of weights as a denoiser to sample from
"""
