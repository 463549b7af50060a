"""From a WorkerConfig to a running worker: check, bind, load, register, serve.

What fails fast is tried first, so that a taken port or a missing library is not found out after a minute of
loading weights.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import Future
from uuid import uuid4

import torch
import zmq.asyncio

from pdengine.engine.block_pool import BlockPool
from pdengine.engine.cpu_threads import compute_threads
from pdengine.engine.device_memory import CudaContext
from pdengine.engine.devices import open_device
from pdengine.engine.engine import Engine
from pdengine.engine.gpu_memory import (
    TRIAL_BLOCKS,
    check_gpu_model,
    describe_gpu_use,
    measure_gpu_use,
    plan_gpu_memory,
    trial_steps,
)
from pdengine.engine.kv_cache import LAYOUT, KVCache, dtype_name
from pdengine.engine.memory import (
    MemoryPlan,
    available_memory,
    check_memory,
    check_weights,
    format_bytes,
    plan_memory,
)
from pdengine.engine.metrics import WorkerMetrics
from pdengine.engine.pool_pages import PoolPages
from pdengine.engine.pulls import Pulls
from pdengine.engine.pushes import Pushes
from pdengine.engine.runner import Runner
from pdengine.engine.scheduler import Scheduler, SchedulerConfig
from pdengine.engine.step_limit import StepLimit
from pdengine.engine.worker import Worker, WorkerParts
from pdengine.engine.worker_config import StartupError, WorkerConfig
from pdengine.engine.worker_keys import WorkerKeys
from pdengine.models.config import ModelConfig, load_config
from pdengine.models.decoder import Decoder
from pdengine.models.fingerprint import model_fingerprint, weights_fingerprint
from pdengine.models.weights import load_decoder
from pdengine.transport.addresses import check_address, check_exposure, split_tcp_address
from pdengine.transport.messages import PROTOCOL_VERSION, Compatibility, PeerDescriptor, PeerRequest
from pdengine.transport.metrics_server import MetricsServer
from pdengine.transport.service_manager import ServiceManager, serving
from pdengine.transport.sockets import ServerSocket
from pdengine.transport.transfer import TransferEvent
from pdengine.transport.two_path_transfer import TwoPathTransfer
from pdengine.transport.ucx_loop import WARM_UP_BYTES
from pdengine.transport.ucx_transfer import CudaPool
from pdengine.triton_kernels.openmp import end_threads
from pdengine.triton_kernels.vector_code import has_bf16_dot_product

logger = logging.getLogger(__name__)

MAX_PEER_MESSAGE_BYTES = 2**20  # between workers go the ids of leases
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_worker(
    config: WorkerConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    service: ServiceManager | None = None,
) -> None:
    """Run a worker until SIGTERM or SIGINT.

    `progress(done, total)`: bytes of weights loaded. service: is told when the worker serves, and fed while
    its engine loop turns.

    Raises StartupError, CheckpointError, AddressError, KeysError or TransferError, one sentence each, if it
    cannot start; WorkerDied if it breaks later.
    """
    check_address(config.router_address)
    for option, address in (("--bind", config.bind_address), ("--advertise", config.advertise_address)):
        if address is not None:
            host, _ = split_tcp_address(address)
            has_keys = config.keys is not None
            check_exposure(f"{option} {address}", host, has_keys=has_keys, insecure=config.insecure)
    model_config = load_config(config.model_directory)
    dtype = DTYPES[config.dtype or model_config.dtype]
    device = open_device(config.device)
    if device.type == "cpu":
        _prepare_cpu(config, dtype)
    check_room(config, model_config, device)
    metrics = WorkerMetrics()
    if config.metrics_address is not None:
        logger.info("metrics on %s/metrics", MetricsServer(config.metrics_address, metrics).url)
    context = zmq.asyncio.Context()
    try:
        _run(config, context, model_config, device, dtype, metrics, progress, service or ServiceManager())
    except BaseException:
        context.destroy(linger=0)  # open sockets would keep whoever collects it waiting
        raise
    context.destroy()


def _run(
    config: WorkerConfig,
    context: zmq.asyncio.Context,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    metrics: WorkerMetrics,
    progress: Callable[[int, int], None] | None,
    service: ServiceManager,
) -> None:
    """Bind, load, register and serve."""
    keys = WorkerKeys(context, config.keys) if config.keys is not None else None
    peer_server = ServerSocket[PeerRequest](
        context,
        PeerRequest,
        keys=keys.to_serve() if keys is not None else None,
        max_message_bytes=MAX_PEER_MESSAGE_BYTES,
    )
    control_address = _advertised(peer_server.bind(config.bind_address), config.advertise_address)

    # The threads below call each other; every name is bound before the first of them has work.
    def deliver(event: TransferEvent) -> None:
        engine.post(event)

    died: Future[None] = Future()  # also if a thread dies before there is a worker

    host, _ = split_tcp_address(control_address)
    transfer = TwoPathTransfer(
        deliver=deliver,
        on_fatal=died.set_exception,
        advertise_host=host,
        same_host=config.same_host if device.type == "cpu" else "ucx",
        cuda=_cuda_pool(device),
    )
    metrics.watch_progress_gaps(transfer.ucx.progress_gaps)
    compatibility = Compatibility(
        protocol=PROTOCOL_VERSION,
        model=model_fingerprint(config.model_directory),
        weights=weights_fingerprint(config.model_directory),
        dtype=dtype_name(dtype),
        block_size=config.block_size,
        layout=LAYOUT,
        ucx=transfer.version,
    )
    model, kv_cache = load_model(config, model_config, device, progress=progress)
    if device.type == "cpu":
        end_threads()  # this thread computes no more; those of the engine's thread shall not share with them
    num_blocks = len(kv_cache.pool)
    descriptor = PeerDescriptor(
        engine_id=uuid4().hex,
        role=config.role,
        control_address=control_address,
        transfer_address=transfer.worker_address,
        region=transfer.register(kv_cache.describe(), kv_cache.memory),
        public_key=keys.public_key if keys is not None else "",
    )
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(scheduler_config(config, num_blocks), pool)
    engine = Engine(
        engine_id=descriptor.engine_id,
        scheduler=scheduler,
        runner=Runner(model, kv_cache, device),
        pulls=Pulls(transfer, pool, block_size=config.block_size, timeout=config.pull_seconds),
        pushes=Pushes(transfer, scheduler, metrics),
        eos_token_ids=frozenset(model_config.eos_token_ids),
        lease_duration=config.lease_seconds,
        metrics=metrics,
        emit=lambda events: worker.on_events(events),
        step_limit=_step_limit(config),
        pages=_pages(kv_cache),
    )
    worker = Worker(
        WorkerParts(
            descriptor=descriptor,
            compatibility=compatibility,
            max_context=model_config.max_position_embeddings,
            block_size=config.block_size,
            max_requests=config.max_requests,
            lease_seconds=config.lease_seconds,
            drain_seconds=config.drain_seconds,
            router_address=config.router_address,
            context=context,
            peer_server=peer_server,
            transfer=transfer,
            engine=engine,
            metrics=metrics,
            died=died,
            keys=keys,
        )
    )
    asyncio.run(_serve(worker, engine, service))


def _prepare_cpu(config: WorkerConfig, dtype: torch.dtype) -> None:
    threads = compute_threads(config.threads)
    if threads is not None:
        torch.set_num_threads(threads)
    logger.info("computing with %d threads", torch.get_num_threads())
    if dtype == torch.bfloat16 and not has_bf16_dot_product():
        logger.warning("this CPU does not multiply bfloat16 natively; --dtype float32 may be faster")


def load_model(
    config: WorkerConfig,
    model_config: ModelConfig,
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Decoder, KVCache]:
    """The decoder on `device`, ready to compute, and a KV cache in the memory that it leaves.

    Raises StartupError or CheckpointError.
    """
    dtype = DTYPES[config.dtype or model_config.dtype]
    model = load_decoder(config.model_directory, model_config, dtype=dtype, device=device, progress=progress)
    if device.type == "cpu":
        model.pack()
    num_blocks = _plan(config, model, dtype, device).num_blocks
    kv_cache = KVCache(
        model_config, num_blocks=num_blocks, block_size=config.block_size, dtype=dtype, device=device
    )
    return model, kv_cache


def check_room(config: WorkerConfig, model: ModelConfig, device: torch.device) -> None:
    """Raise StartupError if it is sure before anything is loaded that the model cannot be served here."""
    if device.type == "cuda":
        check_gpu_model(model)
        free, _ = torch.cuda.mem_get_info(device)
        check_weights(config, model, free)
        return
    plan, available = plan_memory(config, model), available_memory()
    check_memory([plan], available)
    logger.info("%s, %s available before", plan.describe(), format_bytes(available))


def _plan(config: WorkerConfig, model: Decoder, dtype: torch.dtype, device: torch.device) -> MemoryPlan:
    """The size of the KV cache; on a GPU by trying how much memory a step takes. Raises StartupError."""
    if device.type == "cpu":
        return plan_memory(config, model.config)
    trial = KVCache(
        model.config, num_blocks=TRIAL_BLOCKS, block_size=config.block_size, dtype=dtype, device=device
    )
    trial.pool.zero_()
    runner, steps = Runner(model, trial, device), trial_steps(config, model.config)
    logger.info("trying %d steps, which compiles the kernels", len(steps))
    use = measure_gpu_use(device, lambda: [runner.run(chunks) for chunks in steps])
    plan = plan_gpu_memory(config, model.config, use)
    logger.info("%s", describe_gpu_use(plan, use))
    return plan


def _pages(kv_cache: KVCache) -> PoolPages | None:
    if kv_cache.memory is None:
        return None
    region = kv_cache.describe()
    return PoolPages(
        region.base_address,
        num_blocks=region.num_blocks,
        block_bytes=region.block_bytes,
        block_size=kv_cache.block_size,
    )


def _cuda_pool(device: torch.device) -> CudaPool | None:
    if device.type == "cpu":
        return None
    context = CudaContext(device.index)
    return CudaPool(context.make_current, context.allocate(WARM_UP_BYTES))  # in use until the process ends


async def _serve(worker: Worker, engine: Engine, service: ServiceManager) -> None:
    """A worker that waits for its router is ready, too: it serves as soon as there is one."""

    def stop() -> None:
        service.stopping()
        worker.stop()

    def status() -> str:
        return worker.why_not_ready() or "serving"

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with serving(service, status=status, loop_age=engine.step_age):
        await worker.run()


def scheduler_config(config: WorkerConfig, num_blocks: int) -> SchedulerConfig:
    return SchedulerConfig(
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_requests=config.max_requests,
        max_pinned_blocks=max(1, int(num_blocks * config.pinned_share)),
    )


def _step_limit(config: WorkerConfig) -> StepLimit | None:
    if config.max_step_ms is None:
        return None
    return StepLimit(config.max_step_ms / 1000, config.block_size)


def _advertised(bound: str, advertise: str | None) -> str:
    """The address that peers are told: `advertise` with the bound port where its own is 0."""
    bound_host, bound_port = split_tcp_address(bound)
    if advertise is not None:
        host, port = split_tcp_address(advertise)
        return f"tcp://{host}:{port or bound_port}"
    if bound_host == "0.0.0.0":
        raise StartupError(f"bound to {bound}, every interface: say by --advertise which one peers shall use")
    return bound
