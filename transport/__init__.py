"""Wire messages, ZeroMQ sockets, the UCX binding, KV regions and pulls.

This floor knows regions of memory and bytes, not requests; it imports nothing else of pdengine.
"""
