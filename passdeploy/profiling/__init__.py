"""Latency profiling: time the dense and the slim network in turns, with intervals, and describe the machine."""

from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.environment import default_threads, physical_cores, read_environment
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import TimeBudget
from passdeploy.profiling.pair import profile_pair
from passdeploy.profiling.report import Profile, Row

__all__ = [
    "Candidate",
    "Profile",
    "Row",
    "Setting",
    "TimeBudget",
    "default_threads",
    "physical_cores",
    "profile_pair",
    "read_environment",
]
