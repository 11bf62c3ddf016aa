"""LangChain's ChatOpenAI with documents as chunks: `pip install langchain-openai`.

Start ``blocktune serve --model data/tiny``, then: ``python examples/clients/langchain_chat.py``.
"""

import sys

from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "tiny") -> None:
    """Prints the answer as it is generated, and how much of the prompt was cached."""
    retrieved = [Document("Anna Belt is in Lower Kirby.", metadata={"title": "Anna Belt"})]
    documents = [{"title": d.metadata["title"], "text": d.page_content} for d in retrieved]
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, stream_usage=True)
    chain = ChatPromptTemplate([("user", "{question}")]) | chat.bind(
        extra_body={"documents": documents}
    )
    message = None
    for part in chain.stream({"question": "Where is Anna Belt?"}):
        print(part.content, end="", flush=True)
        message = part if message is None else message + part
    print(
        f"\n{message.usage_metadata['input_token_details']['cache_read']} prompt tokens were cached"
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
