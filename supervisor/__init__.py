"""flow-agent: the init system for flow runs on a machine. The house is described in docs/architecture.md."""

__version__ = "0.1.0"
