"""passdeploy: from a trained vision model to a small, fast, checked engine."""

__version__ = "0.1.0"
