"""Which key score holds in one model: how it is measured, and the profile that is kept beside the model."""

from vitcop.calibration.measure import LEAST_CLIPS, calibrate, report
from vitcop.calibration.profiles import FILE_NAME, KEY_SCORES, KeyScore, MethodChoice, Preset, Profile, find_profile

__all__ = [
    "FILE_NAME",
    "KEY_SCORES",
    "LEAST_CLIPS",
    "KeyScore",
    "MethodChoice",
    "Preset",
    "Profile",
    "calibrate",
    "find_profile",
    "report",
]
