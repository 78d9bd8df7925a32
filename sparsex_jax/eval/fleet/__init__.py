"""A simulator of many replicas behind a router: what is found where, how long prompts wait, and what breaks first.

It is driven by events and computes nothing of a model. The modules, from what comes in to what comes out:

    traffic.py      prompts as segments of tokens, at the times when they arrive: chat, RAG and agents, by tenant
    store.py        what a replica has stored: chains of segments with least recently used eviction, pins and tiers
    timing.py       what prefill and decode take, by the engine's own cost model in closed form
    replica.py      a replica's serving loop: rounds of one prefill plan and a few decode steps
    routing.py      policies: round robin, least loaded, session affinity, consistent hashing, and the router's own
    simulation.py   events of a fleet: arrivals, rounds, digests on their way, deaths and restarts
    figures.py      what became of the requests, as figures
    calibration.py  fits the timing to measured rows, and predicts others
    plots.py        the figures as plots

Everything is drawn from a seed: the same seed gives the same events and figures.
"""
