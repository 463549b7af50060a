"""One worker: scheduler, block pool, batch, runner, sampler, KV leases and the worker's loops."""
