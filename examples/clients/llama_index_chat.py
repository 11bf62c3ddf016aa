"""LlamaIndex's OpenAILike with nodes as chunks: `pip install llama-index-llms-openai-like`.

Start ``blocktune serve --model data/tiny``, then: ``python examples/clients/llama_index_chat.py``.
"""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode
from llama_index.llms.openai_like import OpenAILike


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "tiny") -> None:
    """Prints the answer as it is generated, and how much of the prompt was cached."""
    nodes = [TextNode(text="Anna Belt is in Lower Kirby.", metadata={"title": "Anna Belt"})]
    documents = [{"id": n.node_id, "title": n.metadata["title"], "text": n.text} for n in nodes]
    llm = OpenAILike(api_base=url, api_key="none", model=model, is_chat_model=True, temperature=0)
    messages = [ChatMessage(role="user", content="Where is Anna Belt?")]
    for part in llm.stream_chat(messages, extra_body={"documents": documents}):
        print(part.delta or "", end="", flush=True)
    response = llm.chat(messages, extra_body={"documents": documents})
    print(f"\n{response.raw.usage.prompt_tokens_details.cached_tokens} prompt tokens were cached")


if __name__ == "__main__":
    main(*sys.argv[1:3])
