"""The HTTP server: OpenAI's endpoints and a knowledge base, in front of the scheduler.

Read in this order: `app` (the endpoints), `intake` (from a request's body to jobs), `worker` (the scheduler's thread),
`openai` (from events to replies), `tools` (tool calls in texts), `access` (API keys), `faults` (errors), `transport`
(bodies, disconnects and streams), `metrics` (Prometheus), and `server` (the process and its signals).
"""
