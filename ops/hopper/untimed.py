"""What ``impl="auto"`` takes of the forms that were written without a GPU: compiled for sm_90 and run in the emulator.

``impl="hopper"`` takes them all. ``auto`` takes what was measured on an H100 and was faster: True.
"""

from __future__ import annotations

AUTO_TAKES = {
    "packed backward": True,  # the fused backward of packed sequences; else the portable pair
    "backward of wide heads": True,  # the fused one of head dims above 128; else the portable pair
    "softcap": True,  # tanh by the instructions that plan.cap_form and backward_launch name; else by a division
    "key_log_weight": True,  # through shared memory, plan.STAGED; else plan.WEIGHT
}


def taken(form: str, named: bool) -> bool:
    """Whether a call takes the form: always where ``impl="hopper"`` names the back end, else as the table says."""
    return named or AUTO_TAKES[form]


def untimed(form: str) -> str:
    """Why ``auto`` leaves it."""
    return f"{form}: compiled and emulated, not timed on a GPU yet; impl='hopper' takes it"
