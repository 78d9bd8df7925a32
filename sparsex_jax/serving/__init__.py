"""The HTTP server: OpenAI's endpoints and a knowledge base, in front of the scheduler.

Read in this order: `app` (the endpoints), `intake` (from a request's body to jobs), `worker` (the scheduler's thread),
`openai` (from events to replies), `tools` (tool calls in texts), `access` (API keys), `line` (which request is next),
`faults` (errors), `metrics` (Prometheus). Towards the client: `bodies` (read within limits, and checked), `transport`
(disconnects and streams), `connections` (limits of sockets), `sockets` (where it listens), and `server` (the process and
its signals).
"""
