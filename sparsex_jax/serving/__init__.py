"""The HTTP server: OpenAI's and Anthropic's endpoints and a knowledge base, in front of the scheduler.

Read in this order: `app` (the endpoints), `service` (a request's way), `intake` (from a request's body to jobs),
`worker` (the scheduler's thread), `thoughts` and `tools` (what answers consist of), `openai` and `reply` (from events
to replies), `protocols` (Anthropic's messages, OpenAI's responses), `access` (API keys), `line` (who is next), `faults`
(errors), `metrics` (Prometheus) and `exchange` (what is counted and logged of a request).

Towards clients: `bodies` (reads and checks them), `transport` (disconnects and streams), `connections` (their limits),
`sockets` (where the server listens), and `server` (the process and its signals).
"""
