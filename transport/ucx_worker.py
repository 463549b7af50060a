"""One UCX context and worker with the calls that a pull needs. Only the thread that made it may use it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pdengine.transport import ucx_library as ucx
from pdengine.transport.tcp_congestion import without_bbr
from pdengine.transport.transfer import TransferError
from pdengine.transport.ucx_address import (
    UcxAddress,
    pack_address,
    seal,
    shared_memory_namespaces,
    unpack_address,
    unseal,
)
from pdengine.transport.ucx_library import UcxLibrary

FIRST_VERSION_THAT_CLOSES_SAFELY = (1, 16)
_RESOURCE = re.compile(r"resource \d+\s*:.*?--\s*(\S+)")
_LANE = re.compile(r"lane\[\d+\]:\s+\d+:(\S+)\.\d+\s+md\[")


class RegisteredMemory(NamedTuple):
    handle: int  # ucp_mem_h
    remote_key: bytes


class UcxWorker:
    """A worker in single-thread mode for one-sided reads, with an event descriptor to sleep on.

    Endpoints, remote keys and memory handles are passed as integer addresses, because native code uses them
    too. All methods raise UcxError if UCX refuses.

    cuda: the memory that is mapped and read into is a GPU's, whose context is current on this thread. Raises
    TransferError if UCX cannot use it.
    """

    def __init__(self, library: UcxLibrary, settings: dict[str, str], *, cuda: bool = False) -> None:
        self._library = library
        self._ffi = library.ffi
        self._ucp = library.ucp
        self._mapped: list[int] = []
        self._parameters: list[Any] = []  # structs that native code refers to by address
        self._cuda = cuda
        self._context = self._create_context(settings)
        try:
            if cuda:
                self._check_cuda()
            self._worker = self._create_worker()
        except TransferError:
            self._ucp.ucp_cleanup(self._context)
            raise

    @property
    def handle(self) -> int:
        return int(self._ffi.cast("intptr_t", self._worker))

    def event_descriptor(self) -> int:
        """The descriptor that becomes readable on events once the worker is armed; UCX owns it."""
        descriptor = self._ffi.new("int *")
        self._check(self._ucp.ucp_worker_get_efd(self._worker, descriptor), "ucp_worker_get_efd")
        return int(descriptor[0])

    def address(self) -> bytes:
        """What a peer passes to `create_endpoint`."""
        everything, network = self._address(0), self._address(ucx.UCP_WORKER_ADDRESS_FLAG_NET_ONLY)
        return pack_address(UcxAddress(everything, network, shared_memory_namespaces()))

    def map_memory(self, address: int, num_bytes: int) -> RegisteredMemory:
        """Register memory until `close`."""
        parameters = self._ffi.new("ucp_mem_map_params_t *")
        parameters.field_mask = ucx.UCP_MEM_MAP_PARAM_FIELD_ADDRESS | ucx.UCP_MEM_MAP_PARAM_FIELD_LENGTH
        parameters.address = self._pointer(address)
        parameters.length = num_bytes
        if self._cuda:  # UCX would guess, and take for host memory what was allocated before its hooks
            parameters.field_mask |= ucx.UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE
            parameters.memory_type = ucx.UCS_MEMORY_TYPE_CUDA
        memory = self._ffi.new("void **")
        self._check(self._ucp.ucp_mem_map(self._context, parameters, memory), "ucp_mem_map")
        handle = int(self._ffi.cast("intptr_t", memory[0]))
        self._mapped.append(handle)
        buffer, size = self._ffi.new("void **"), self._ffi.new("size_t *")
        self._check(self._ucp.ucp_rkey_pack(self._context, memory[0], buffer, size), "ucp_rkey_pack")
        remote_key = bytes(self._ffi.buffer(buffer[0], size[0]))
        self._ucp.ucp_rkey_buffer_release(buffer[0])
        return RegisteredMemory(handle, seal(remote_key))

    def get_parameters(self, memory: int | None) -> int:
        """The address of the ucp_request_param_t for GETs into mapped memory, or into any memory (None)."""
        parameters = self._ffi.new("ucp_request_param_t *")
        if memory is not None:
            parameters.op_attr_mask = ucx.UCP_OP_ATTR_FIELD_MEMH
            parameters.memh = self._pointer(memory)
        if self._cuda:
            parameters.op_attr_mask |= ucx.UCP_OP_ATTR_FIELD_MEMORY_TYPE
            parameters.memory_type = ucx.UCS_MEMORY_TYPE_CUDA
        self._parameters.append(parameters)
        return int(self._ffi.cast("intptr_t", parameters))

    def create_endpoint(self, worker_address: bytes, error_handler: int, error_argument: int) -> int:
        """An endpoint in error mode "peer"; `error_handler` is the address of a ucp_err_handler_cb_t.

        Raises TransferError if `worker_address` is not what `address` gave.
        """
        buffer = self._ffi.from_buffer(unpack_address(worker_address).reachable_from_here())
        parameters = self._ffi.new("ucp_ep_params_t *")
        parameters.field_mask = (
            ucx.UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
            | ucx.UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
            | ucx.UCP_EP_PARAM_FIELD_ERR_HANDLER
        )
        parameters.address = buffer
        parameters.err_mode = ucx.UCP_ERR_HANDLING_MODE_PEER
        parameters.err_handler.cb = self._pointer(error_handler)
        parameters.err_handler.arg = self._pointer(error_argument)
        endpoint = self._ffi.new("void **")
        with without_bbr():
            status = self._ucp.ucp_ep_create(self._worker, parameters, endpoint)
        self._check(status, "ucp_ep_create")
        return int(self._ffi.cast("intptr_t", endpoint[0]))

    def close_endpoint(self, endpoint: int) -> int:
        """Close by force: cancels the endpoint's requests. Returns the request to wait for, or 0."""
        parameters = self._ffi.new("ucp_request_param_t *")
        parameters.op_attr_mask = ucx.UCP_OP_ATTR_FIELD_FLAGS
        parameters.flags = ucx.UCP_EP_CLOSE_FLAG_FORCE
        request = self._ucp.ucp_ep_close_nbx(self._pointer(endpoint), parameters)
        result = int(self._ffi.cast("intptr_t", request))
        if ucx.UCS_ERR_LAST <= result < 0:
            self._check(result, "ucp_ep_close_nbx")
        return result

    def unpack_remote_key(self, endpoint: int, remote_key: bytes) -> int:
        """Raises TransferError if `remote_key` is not what `map_memory` gave."""
        key = self._ffi.new("void **")
        buffer = self._ffi.from_buffer(unseal(remote_key, "remote key"))
        status = self._ucp.ucp_ep_rkey_unpack(self._pointer(endpoint), buffer, key)
        self._check(status, "ucp_ep_rkey_unpack")
        return int(self._ffi.cast("intptr_t", key[0]))

    def destroy_remote_key(self, remote_key: int) -> None:
        self._ucp.ucp_rkey_destroy(self._pointer(remote_key))

    def lanes(self, endpoint: int) -> str:
        """The transports of an endpoint's lanes as UCX reports them, e.g. "sysv, posix" or "tcp/eth0"."""
        return parse_lanes(self._report(self._ucp.ucp_ep_print_info, self._pointer(endpoint)))

    def transports(self) -> list[str]:
        """What the settings leave of the transports, each with its device, e.g. "sysv/memory", "tcp/eth0"."""
        report = self._report(self._ucp.ucp_context_print_info, self._context)
        return list(dict.fromkeys(_RESOURCE.findall(report)))

    def close(self) -> None:
        """Release everything. All endpoints must be closed and all remote keys destroyed.

        Not with the oldest versions: they can crash here when replies to a reader that has left are still
        queued, and a process closes its transfer only when it ends.
        """
        if self._library.version < FIRST_VERSION_THAT_CLOSES_SAFELY:
            return
        for memory in self._mapped:
            self._ucp.ucp_mem_unmap(self._context, self._pointer(memory))
        self._ucp.ucp_worker_destroy(self._worker)
        self._ucp.ucp_cleanup(self._context)

    def _create_context(self, settings: dict[str, str]) -> Any:
        config = self._ffi.new("void **")
        status = self._ucp.ucp_config_read(self._ffi.NULL, self._ffi.NULL, config)
        self._check(status, "ucp_config_read")
        try:
            for name, value in settings.items():
                status = self._ucp.ucp_config_modify(config[0], name.encode(), value.encode())
                self._check(status, f"ucp_config_modify of {name}")
            parameters = self._ffi.new("ucp_params_t *")
            parameters.field_mask = ucx.UCP_PARAM_FIELD_FEATURES
            parameters.features = ucx.UCP_FEATURE_RMA | ucx.UCP_FEATURE_WAKEUP
            context = self._ffi.new("void **")
            status = self._ucp.ucp_init_version(*ucx.OLDEST_API, parameters, config[0], context)
            self._check(status, "ucp_init_version")
        finally:
            self._ucp.ucp_config_release(config[0])
        return context[0]

    def _check_cuda(self) -> None:
        attributes = self._ffi.new("ucp_context_attr_t *")
        attributes.field_mask = ucx.UCP_ATTR_FIELD_MEMORY_TYPES
        self._check(self._ucp.ucp_context_query(self._context, attributes), "ucp_context_query")
        if not attributes.memory_types >> ucx.UCS_MEMORY_TYPE_CUDA & 1:
            raise TransferError(
                f"UCX of {self._library.path} finds no GPU; with UCX_LOG_LEVEL=debug it says why"
            )

    def _create_worker(self) -> Any:
        parameters = self._ffi.new("ucp_worker_params_t *")
        parameters.field_mask = ucx.UCP_WORKER_PARAM_FIELD_THREAD_MODE
        parameters.thread_mode = ucx.UCS_THREAD_MODE_SINGLE
        worker = self._ffi.new("void **")
        with without_bbr():
            status = self._ucp.ucp_worker_create(self._context, parameters, worker)
        self._check(status, "ucp_worker_create")
        return worker[0]

    def _address(self, flags: int) -> bytes:
        attributes = self._ffi.new("ucp_worker_attr_t *")
        attributes.field_mask = ucx.UCP_WORKER_ATTR_FIELD_ADDRESS | ucx.UCP_WORKER_ATTR_FIELD_ADDRESS_FLAGS
        attributes.address_flags = flags
        self._check(self._ucp.ucp_worker_query(self._worker, attributes), "ucp_worker_query")
        packed = bytes(self._ffi.buffer(attributes.address, attributes.address_length))
        self._ucp.ucp_worker_release_address(self._worker, attributes.address)
        return packed

    def _report(self, print_info: Any, subject: Any) -> str:
        """What one of UCX's functions for people prints about `subject`."""
        libc, ffi = self._library.libc, self._ffi
        text, size = ffi.new("char **"), ffi.new("size_t *")
        stream = libc.open_memstream(text, size)
        print_info(subject, stream)
        libc.fclose(stream)
        report: str = ffi.string(text[0]).decode(errors="replace")
        libc.free(text[0])
        return report

    def _pointer(self, address: int) -> Any:
        return self._ffi.cast("void *", address)

    def _check(self, status: int, call: str) -> None:
        self._library.check(status, call)


def parse_lanes(report: str) -> str:
    """The distinct lanes in the output of ucp_ep_print_info; memory transports without their device name."""
    lanes = [lane.removesuffix("/memory") for lane in _LANE.findall(report)]
    return ", ".join(dict.fromkeys(lanes)) or "unknown"
