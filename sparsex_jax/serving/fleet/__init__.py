"""Several engines behind one endpoint: what a replica tells of its store, and the front that sends requests there.

Read in this order: `pages` (what comes into a store and goes), `feed` (digests for our router) and `kv_events` (vLLM's
events for other routers), `preview` (what a request's body says to a router), `replica` (one engine), `front` (the
endpoint), and `peers` with `peer_server` (blocks that replicas get from each other). None of it knows Ray:
`scripts/serve_ray.py` puts it on Ray Serve.
"""
