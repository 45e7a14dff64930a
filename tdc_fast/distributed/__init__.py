"""The processes of one run: their ranks, the messages between them, and sums of gradients.

launch       joining the processes that torchrun started
connections  those between them, which end when a machine no longer answers
world        this process among them, and the exchanges of all of them
gradients    sums of gradients over the processes that train the same weights
placement    which processes train which experts
"""

from tdc_fast.distributed.gradients import GradientSum
from tdc_fast.distributed.launch import first_on_machine, joined, launched_rank, refuse_device, restarted
from tdc_fast.distributed.placement import Team, place_experts
from tdc_fast.distributed.world import LostProcess, World, is_of_all, losses_named, on_all, world

__all__ = [
    "GradientSum",
    "LostProcess",
    "Team",
    "World",
    "first_on_machine",
    "is_of_all",
    "joined",
    "launched_rank",
    "losses_named",
    "on_all",
    "place_experts",
    "refuse_device",
    "restarted",
    "world",
]
