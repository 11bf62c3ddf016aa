"""An OpenAI-compatible server on the embedded engine: `blocktune serve`."""

from blocktune.server.app import create_app
from blocktune.server.config import Limits, ServerConfig, Tenant, load_tenants
from blocktune.server.service import Service

__all__ = ["Limits", "ServerConfig", "Service", "Tenant", "create_app", "load_tenants"]
