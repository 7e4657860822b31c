"""Latency that can be trusted: dense and slim in turns, with an interval, on a described machine."""

from passdeploy.profiling.compare import Profile, Row, Subject, profile_pair
from passdeploy.profiling.environment import physical_cores, read_environment
from passdeploy.profiling.measure import Budget

__all__ = ["Budget", "Profile", "Row", "Subject", "physical_cores", "profile_pair", "read_environment"]
