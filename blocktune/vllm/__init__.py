"""Cached chunks on vLLM: a KV connector, a client and a route for documents.

vLLM finds `register` by the entry points in pyproject.toml. Then it only needs the option::

    --kv-transfer-config '{"kv_connector": "BlocktuneConnector", "kv_role": "kv_both",
                           "kv_connector_extra_config": {"store": "chunks/"}}'
"""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.vllm.client": "ChunkClient Rendered",
        "blocktune.vllm.llm": "ChunkLLM Completion",
        "blocktune.vllm.plan": "LoadPlan Segment",
    },
)


def register() -> None:
    """Registers the connector; vLLM calls this in each process, sometimes twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from blocktune.vllm.guard import install

    install()
    name = "BlocktuneConnector"
    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, "blocktune.vllm.connector", name)
