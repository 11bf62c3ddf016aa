"""An OpenAI-compatible server on the embedded engine: `blocktune serve`."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.server.app": "create_app",
        "blocktune.server.config": "Limits ServerConfig Tenant load_tenants",
        "blocktune.server.service": "Service",
    },
)
