"""Latency that can be trusted: dense and slim in turns, with an interval, on a described machine."""

from passdeploy.profiling.candidates import Candidate
from passdeploy.profiling.environment import physical_cores, read_environment
from passdeploy.profiling.execution import Setting
from passdeploy.profiling.interleaved import TimeBudget
from passdeploy.profiling.pair import profile_pair
from passdeploy.profiling.report import Profile, Row

__all__ = ["Candidate", "Profile", "Row", "Setting", "TimeBudget", "physical_cores", "profile_pair", "read_environment"]
