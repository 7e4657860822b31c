"""Latency that can be trusted: dense and slim in turns, with an interval, on a described machine."""

from passdeploy.profiling.compare import profile_pair
from passdeploy.profiling.environment import physical_cores, read_environment
from passdeploy.profiling.measure import Budget
from passdeploy.profiling.rows import Profile, Row
from passdeploy.profiling.setting import Setting
from passdeploy.profiling.subjects import Subject

__all__ = ["Budget", "Profile", "Row", "Setting", "Subject", "physical_cores", "profile_pair", "read_environment"]
