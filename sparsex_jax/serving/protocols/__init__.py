"""Protocols beside OpenAI's chat and text completions. Each turns its requests into chats, and answers into events.

    /v1/messages    Anthropic's: `messages` (requests), `messages_reply` (replies)
    /v1/responses   OpenAI's: `responses`, `responses_reply`
    /tokenize       vLLM's: `tokens`

What they share is in `chats`. Nothing here knows how a prompt is made of a chat, or what becomes of it: `Service` does
with the `ChatRequest` what it does with those that come in this form.
"""

from sparsex_jax.serving.protocols import messages, responses, tokens

routers = (messages.router, responses.router, tokens.router)
