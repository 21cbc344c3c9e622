"""A small real inference engine: paged KV, continuous batching, an OpenAI-compatible server.

Life of a request: `server` parses it, `engine` owns the step loop and its thread, `scheduler` decides what
each step computes, `block_manager` owns the pages and the prefix cache, `model` computes, `sampler` picks.
"""
