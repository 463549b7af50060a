"""Finding, loading and declaring libucp: UCX through cffi in ABI mode, without a compiler.

Structs are declared as in the newest UCX (ucp.h of 1.22, https://openucx.readthedocs.io), always zeroed, and
used with the field masks of 1.13 only, so that every library from 1.13 on reads what it knows. `ucs_status_t`
is a packed enum, hence one byte.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cffi

from pdengine.transport.transfer import TransferError

OLDEST_API = (1, 13)
OLDEST_WITH_CUDA = (1, 16)  # before, the target of an emulated read takes its GPU memory for host memory
INFINIBAND_DEVICES = Path("/sys/class/infiniband")
RTLD_NODELETE = 0x1000  # Linux; UCX installs memory hooks and must never be unloaded

UCS_ERR_LAST = -100

UCP_FEATURE_RMA = 1 << 1
UCP_FEATURE_WAKEUP = 1 << 4
UCP_PARAM_FIELD_FEATURES = 1 << 0
UCP_ATTR_FIELD_MEMORY_TYPES = 1 << 2
UCP_WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0
UCS_THREAD_MODE_SINGLE = 0
UCP_WORKER_ATTR_FIELD_ADDRESS = 1 << 1
UCP_WORKER_ATTR_FIELD_ADDRESS_FLAGS = 1 << 2
UCP_WORKER_ADDRESS_FLAG_NET_ONLY = 1 << 0
UCP_MEM_MAP_PARAM_FIELD_ADDRESS = 1 << 0
UCP_MEM_MAP_PARAM_FIELD_LENGTH = 1 << 1
UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE = 1 << 4
UCP_EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0
UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1
UCP_EP_PARAM_FIELD_ERR_HANDLER = 1 << 2
UCP_ERR_HANDLING_MODE_PEER = 1
UCP_OP_ATTR_FIELD_FLAGS = 1 << 4
UCP_OP_ATTR_FIELD_MEMORY_TYPE = 1 << 6
UCP_OP_ATTR_FIELD_MEMH = 1 << 8
UCP_EP_CLOSE_FLAG_FORCE = 1 << 0
UCS_MEMORY_TYPE_CUDA = 1

_DECLARATIONS = """
typedef signed char ucs_status_t;
typedef struct { unsigned long ucs_bits[16]; } ucs_cpu_set_t;
typedef struct { const void *addr; unsigned addrlen; } ucs_sock_addr_t;

typedef struct {
    uint64_t field_mask;
    uint64_t features;
    size_t request_size;
    void *request_init;
    void *request_cleanup;
    uint64_t tag_sender_mask;
    int mt_workers_shared;
    size_t estimated_num_eps;
    size_t estimated_num_ppn;
    const char *name;
    size_t node_local_id;
} ucp_params_t;

typedef struct {
    uint64_t field_mask;
    size_t request_size;
    int thread_mode;
    uint64_t memory_types;
    char name[32];
    size_t device_counter_size;
} ucp_context_attr_t;

typedef struct {
    uint64_t field_mask;
    int thread_mode;
    ucs_cpu_set_t cpu_mask;
    unsigned events;
    void *user_data;
    int event_fd;
    uint64_t flags;
    const char *name;
    size_t am_alignment;
    uint64_t client_id;
} ucp_worker_params_t;

typedef struct {
    uint64_t field_mask;
    int thread_mode;
    uint32_t address_flags;
    void *address;
    size_t address_length;
    size_t max_am_header;
    char name[32];
    size_t max_debug_string;
} ucp_worker_attr_t;

typedef struct {
    uint64_t field_mask;
    void *address;
    size_t length;
    unsigned flags;
    unsigned prot;
    int memory_type;
    const void *exported_memh_buffer;
} ucp_mem_map_params_t;

typedef struct {
    uint64_t field_mask;
    const void *address;
    int err_mode;
    struct { void *cb; void *arg; } err_handler;
    void *user_data;
    unsigned flags;
    ucs_sock_addr_t sockaddr;
    void *conn_request;
    const char *name;
    ucs_sock_addr_t local_sockaddr;
} ucp_ep_params_t;

typedef struct {
    uint32_t op_attr_mask;
    uint32_t flags;
    void *request;
    void *cb;
    uint64_t datatype;
    void *user_data;
    void *reply_buffer;
    int memory_type;
    void *recv_info;
    void *memh;
    uint64_t remote_datatype;
    const void *remote;
    size_t remote_count;
} ucp_request_param_t;

void ucp_get_version(unsigned *major, unsigned *minor, unsigned *release);
const char *ucs_status_string(ucs_status_t status);

ucs_status_t ucp_config_read(const char *env_prefix, const char *filename, void **config);
ucs_status_t ucp_config_modify(void *config, const char *name, const char *value);
void ucp_config_release(void *config);
ucs_status_t ucp_init_version(
    unsigned major, unsigned minor, const ucp_params_t *params, const void *config, void **context);
ucs_status_t ucp_context_query(void *context, ucp_context_attr_t *attributes);
void ucp_context_print_info(void *context, void *stream);
void ucp_cleanup(void *context);

ucs_status_t ucp_worker_create(void *context, const ucp_worker_params_t *params, void **worker);
void ucp_worker_destroy(void *worker);
ucs_status_t ucp_worker_query(void *worker, ucp_worker_attr_t *attr);
void ucp_worker_release_address(void *worker, void *address);
ucs_status_t ucp_worker_get_efd(void *worker, int *fd);
ucs_status_t ucp_worker_arm(void *worker);
unsigned ucp_worker_progress(void *worker);

ucs_status_t ucp_mem_map(void *context, const ucp_mem_map_params_t *params, void **memh);
ucs_status_t ucp_mem_unmap(void *context, void *memh);
ucs_status_t ucp_rkey_pack(void *context, void *memh, void **buffer, size_t *size);
void ucp_rkey_buffer_release(void *buffer);
ucs_status_t ucp_ep_rkey_unpack(void *endpoint, const void *buffer, void **rkey);
void ucp_rkey_destroy(void *rkey);

ucs_status_t ucp_ep_create(void *worker, const ucp_ep_params_t *params, void **endpoint);
void *ucp_ep_close_nbx(void *endpoint, const ucp_request_param_t *param);
void ucp_ep_print_info(void *endpoint, void *stream);
void *ucp_get_nbx(
    void *endpoint, void *buffer, size_t count, uint64_t remote_address, void *rkey,
    const ucp_request_param_t *param);
void *ucp_put_nbx(
    void *endpoint, const void *buffer, size_t count, uint64_t remote_address, void *rkey,
    const ucp_request_param_t *param);
void *ucp_ep_flush_nbx(void *endpoint, const ucp_request_param_t *param);
ucs_status_t ucp_request_check_status(void *request);
void ucp_request_free(void *request);
"""

_LIBC_DECLARATIONS = """
struct pollfd { int fd; short events; short revents; };
struct timespec { long seconds; long nanoseconds; };
int poll(struct pollfd *descriptors, unsigned long count, int timeout);
int clock_gettime(int clock, struct timespec *time);
int sched_yield(void);
void *open_memstream(char **buffer, size_t *size);
int fclose(void *stream);
void free(void *pointer);
"""


class UcxNotFound(TransferError):
    """No libucp on this machine; the message says how to install one."""


class UcxError(TransferError):
    """A UCX call that failed; `status` is the negative ucs_status_t."""

    def __init__(self, status: int, call: str, meaning: str) -> None:
        super().__init__(f"{call} failed: {meaning} ({status})")
        self.status = status
        self.call = call


@dataclass(frozen=True)
class UcxLibrary:
    """A loaded libucp with its declarations, and the few functions of libc that go with it."""

    path: Path
    ffi: Any
    ucp: Any
    libc: Any
    version: tuple[int, int, int]

    def describe_status(self, status: int) -> str:
        text: bytes = self.ffi.string(self.ucp.ucs_status_string(status))
        return text.decode()

    def check(self, status: int, call: str) -> None:
        """Raise UcxError if `status` is an error."""
        if status < 0:
            raise UcxError(status, call, self.describe_status(status))

    def address_of(self, function: str) -> int:
        """The address of a declared function of libucp or libc, for calls from native code."""
        library = self.ucp if function.startswith("ucp_") else self.libc
        return int(self.ffi.cast("intptr_t", self.ffi.addressof(library, function)))


def load_ucx(path: Path | None = None, *, cuda: bool = False) -> UcxLibrary:
    """Load libucp from `path`, by default the one that `find_ucx` prefers. cuda: it will move GPU memory.

    Raises UcxNotFound if there is none, or it cannot be loaded, or it is older than 1.13 (with `cuda` 1.16).
    """
    if path is None:
        path = find_ucx(os.environ, cuda=cuda)
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    ffi.cdef(_LIBC_DECLARATIONS)
    flags = ffi.RTLD_LAZY | ffi.RTLD_GLOBAL | RTLD_NODELETE
    try:
        # Dependencies first and global, from the same folder: by name the loader would take others. Lazily,
        # because libucm and libucs need each other.
        for name in ("libucm.so.0", "libucs.so.0", "libuct.so.0"):
            if (path.parent / name).exists():
                ffi.dlopen(str(path.parent / name), flags)
        ucp = ffi.dlopen(str(path), flags)
        if cuda and (module := _cuda_module(path)) is not None:
            # UCX would do it, but leave the module out in silence where it cannot be loaded.
            ffi.dlopen(str(module), ffi.RTLD_LAZY | RTLD_NODELETE)
    except OSError as error:
        reason = str(error).partition("  Additionally")[0]  # which is about names without a path
        raise UcxNotFound(f"{path} cannot be loaded as libucp: {reason}") from None
    numbers = ffi.new("unsigned[3]")
    ucp.ucp_get_version(numbers, numbers + 1, numbers + 2)
    version = (int(numbers[0]), int(numbers[1]), int(numbers[2]))
    if version[:2] < OLDEST_API:
        raise UcxNotFound(f"{path} is UCX {version[0]}.{version[1]}, older than the required 1.13")
    if cuda and version[:2] < OLDEST_WITH_CUDA:
        raise UcxNotFound(
            f"{path} is UCX {version[0]}.{version[1]}, older than the 1.16 that a KV cache on a GPU needs"
        )
    return UcxLibrary(path, ffi, ucp, ffi.dlopen(None), version)


class UcxChoice(NamedTuple):
    path: Path
    reason: str  # continues "taken because"


def find_ucx(environ: Mapping[str, str], *, cuda: bool = False) -> Path:
    """The path of `choose_ucx`. Raises UcxNotFound."""
    return choose_ucx(environ, cuda=cuda).path


def choose_ucx(environ: Mapping[str, str], *, cuda: bool = False) -> UcxChoice:
    """The libucp to load: `PDENGINE_UCX_LIB`, the system's if it can use RDMA devices that are there, the
    libucx wheel's (built without RDMA), the system's. cuda: only those that come with UCX's CUDA module.

    Nothing is loaded to find out, because two libucp in one process would share their libucs. Raises
    UcxNotFound.
    """
    if configured := environ.get("PDENGINE_UCX_LIB"):
        if not Path(configured).is_file():
            raise UcxNotFound(f"PDENGINE_UCX_LIB is {configured!r}, which is not a file")
        if cuda and not has_cuda(Path(configured)):
            raise UcxNotFound(f"PDENGINE_UCX_LIB is {configured!r}, which was built without CUDA support")
        return UcxChoice(Path(configured), "PDENGINE_UCX_LIB names it")
    system = next((path for path in _system_libraries(environ) if has_cuda(path) or not cuda), None)
    if system is not None and has_rdma(system):
        return UcxChoice(system, "it is the system's and drives the RDMA devices")
    wheel = _wheel_library()
    if wheel is not None and (has_cuda(wheel) or not cuda):
        reason = "it is the libucx wheel's, and the system has none that drives RDMA devices"
        return UcxChoice(wheel, reason)
    if system is not None:
        return UcxChoice(system, "it is the system's, and no libucx wheel is installed")
    if cuda:
        raise UcxNotFound("no libucp with CUDA support was found: pip install 'pdengine[cu13]'")
    raise UcxNotFound(
        "libucp was not found: install it with pip install 'pdengine[cu12]', or the distribution's libucx0"
    )


def has_rdma(libucp: Path) -> bool:
    """Whether this machine has RDMA devices and this libucp comes with the module that drives them."""
    devices = INFINIBAND_DEVICES.is_dir() and any(INFINIBAND_DEVICES.iterdir())
    return devices and any((libucp.resolve().parent / "ucx").glob("libuct_ib.so*"))


def has_cuda(libucp: Path) -> bool:
    """Whether this libucp comes with the module that moves GPU memory."""
    return _cuda_module(libucp) is not None


def _cuda_module(libucp: Path) -> Path | None:
    return min((libucp.resolve().parent / "ucx").glob("libuct_cuda.so*"), default=None)


def _wheel_library() -> Path | None:
    package = importlib.util.find_spec("libucx")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "lib" / "libucp.so.0"
    return path if path.exists() else None


def _system_libraries(environ: Mapping[str, str]) -> Iterator[Path]:
    for folder in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if folder and (Path(folder) / "libucp.so.0").exists():
            yield Path(folder) / "libucp.so.0"
    try:
        cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in cache.splitlines():
        name, _, path = line.partition(" => ")
        if name.split()[:1] == ["libucp.so.0"] and Path(path).exists():
            yield Path(path)
