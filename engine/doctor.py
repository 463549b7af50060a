"""Whether this machine can serve, and how well: one finding for each thing that it depends on.

Nothing here needs torch or libucp: that they are missing is a finding. What may crash a process runs in one
of its own.
"""

import contextlib
import errno
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from pdengine.engine.memory import available_memory, format_bytes
from pdengine.engine.worker_config import KV_MEMORY_ON_CPU
from pdengine.transport.transfer import TransferError
from pdengine.transport.ucx_library import INFINIBAND_DEVICES, UcxNotFound, choose_ucx, has_cuda, has_rdma
from pdengine.transport.ucx_settings import interface_addresses, interface_of

LOOPBACK_HOST = "127.0.0.1"
DEFAULT_PORTS = {5555: "clients", 5556: "workers"}
OLDEST_TORCH = (2, 11)
OLDEST_SOUND_UCX = (1, 16)  # before, a forced close does not end every read
TRIAL_SECONDS = 180.0  # the first one compiles the native loop
CAP_IPC_LOCK = 14  # <linux/capability.h>: the limit of locked memory does not hold

Verdict: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """verdict: "fail" where serving would. advice: what to do. is_slow: it would work, but slower than this
    machine can.
    """

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""
    is_slow: bool = False


class TransferReport(msgspec.Struct):
    """What a trial of libucp found, or why it ended without. transports: with their devices. lanes: of a
    connection between two ends of this machine.
    """

    error: str = ""
    version: str = ""
    transports: list[str] = []
    lanes: str = ""


Check: TypeAlias = Callable[[], Iterable[Finding]]


def examine(advertise_host: str = LOOPBACK_HOST) -> Iterator[Finding]:
    """All findings, each as soon as it is known. advertise_host: what workers would tell their peers."""
    checks: dict[str, Check] = {
        "python": check_python,
        "torch": check_torch,
        "triton": check_triton,
        "cuda": check_cuda,
        "libucp": lambda: check_transfer(_usable_host(advertise_host)),
        "locked memory": check_locked_memory,
        "address": lambda: check_address(advertise_host),
        "ports": check_ports,
        "huge pages": check_huge_pages,
        "memory": check_memory,
        "processor": check_processor,
        "numba cache": check_numba_cache,
    }
    for name, check in checks.items():
        yield from run_check(name, check)


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check; if it crashes, that is one more."""
    try:
        yield from check()
    except Exception as error:
        reason = " ".join(str(error).split())
        yield Finding(name, "fail", f"the check itself failed: {type(error).__name__}: {reason}")


def check_python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")


def check_torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported: {error}", "pip install 'torch>=2.11'")
        return
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    detail = f"{torch.__version__}, {build}"
    if _version(torch.__version__) < OLDEST_TORCH:
        yield Finding("torch", "fail", f"{detail}, older than 2.11", "pip install 'torch>=2.11'")
    else:
        yield Finding("torch", "ok", detail)


def check_triton() -> Iterator[Finding]:
    try:
        yield Finding("triton", "ok", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        yield Finding("triton", "ok", "not installed; nothing on the CPU needs it")


def check_cuda() -> Iterator[Finding]:
    has_device = Path("/dev/nvidiactl").exists()
    try:
        import torch
    except ImportError:
        yield Finding("cuda", "warn", "not looked for without torch")
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("cuda", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}")
    elif has_device:
        advice = "install the CUDA build of torch and a driver that fits it"
        yield Finding("cuda", "warn", "an NVIDIA driver is there, but torch cannot use it", advice)
    else:
        yield Finding("cuda", "ok", "no devices; serving runs on the CPU")


def check_transfer(advertise_host: str) -> Iterator[Finding]:
    """libucp and why that one, what it can do, and a pull by it."""
    try:
        path, reason = choose_ucx(os.environ)
    except UcxNotFound as error:
        advice = "correct or unset it" if "PDENGINE_UCX_LIB" in os.environ else ""
        yield Finding("libucp", "fail", str(error), advice)
        return
    where = f"{path}, because {reason}"
    report = _try_transfer(advertise_host)
    if report.error:
        own = sorted(name for name in os.environ if name.startswith("UCX_"))
        advice = f"unset {', '.join(own)}, or " if own else ""
        advice += "try another libucp: pip install 'pdengine[cu12]', or name one by PDENGINE_UCX_LIB"
        yield Finding("libucp", "fail", f"{where}: {report.error}", advice)
        return
    if _version(report.version) < OLDEST_SOUND_UCX:
        advice = "use UCX 1.16 or newer, for instance pip install 'pdengine[cu12]'"
        detail = f"{report.version}, in which reads from a dead peer may not end; {where}"
        yield Finding("libucp", "warn", detail, advice)
    else:
        yield Finding("libucp", "ok", f"{report.version}; {where}")
    yield Finding("transports", "ok", ", ".join(report.transports))
    yield Finding("lanes", "ok", f"{report.lanes}, in a pull from this machine to itself")
    yield rdma_finding(path, report.transports, advertise_host)
    yield from check_ucx_cuda(path)


def rdma_finding(
    libucp: Path, transports: list[str], advertise_host: str, devices: Path = INFINIBAND_DEVICES
) -> Finding:
    """Whether RDMA devices are there and would be used; TCP where they are not is slow."""
    names = sorted(device.name for device in devices.glob("*"))
    if not names:
        return Finding("rdma", "ok", "no devices; other machines are reached by TCP")
    interface = interface_of(advertise_host)
    interfaces = sorted({net.name for net in devices.glob("*/device/net/*")})
    found = f"{', '.join(names)} on {', '.join(interfaces) or 'no interface'}"
    if not has_rdma(libucp):
        advice = (
            "install the distribution's or the vendor's UCX, and let PDENGINE_UCX_LIB name its libucp.so.0"
        )
        return Finding(
            "rdma", "warn", f"{found}, but this libucp has no RDMA transports", advice, is_slow=True
        )
    used = [t for t in transports if t.partition("/")[2].split(":")[0] in names]
    if used:
        return Finding("rdma", "ok", f"{found}; used: {', '.join(used)}")
    if interface == "lo":
        return Finding("rdma", "ok", f"{found}; used where a worker advertises an address of theirs")
    advice = "advertise an address of an interface that has an RDMA device"
    return Finding("rdma", "warn", f"{found}, but {interface} goes by TCP", advice, is_slow=True)


def check_ucx_cuda(libucp: Path) -> Iterator[Finding]:
    if has_cuda(libucp):
        yield Finding("libucp cuda", "ok", "built with CUDA support")
    else:
        yield Finding("libucp cuda", "ok", "built without CUDA support, which KV caches on GPUs would need")


def check_locked_memory(devices: Path = INFINIBAND_DEVICES) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    if not any(devices.glob("*")):
        yield Finding("locked memory", "ok", f"limit {limit}; only RDMA locks memory")
    elif soft == resource.RLIM_INFINITY or _has_capability(CAP_IPC_LOCK):
        yield Finding("locked memory", "ok", f"limit {limit}")
    else:
        advice = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the systemd unit"
        detail = f"limit {limit}: a larger KV cache cannot be registered for RDMA"
        yield Finding("locked memory", "fail", detail, advice)


def check_address(advertise_host: str) -> Iterator[Finding]:
    """The address that would be advertised, and the others that could be."""
    others = [
        f"{ip_address(packed)} ({name})"
        for name, _, packed in interface_addresses()
        if not ip_address(packed).is_loopback and not ip_address(packed).is_link_local
    ]
    listed = ", ".join(others) or "none"
    try:
        interface = interface_of(advertise_host)
    except TransferError as error:
        yield Finding("address", "fail", str(error), f"advertise one of {listed}")
        return
    if interface == "lo":
        detail = f"{advertise_host} (lo), for workers on this machine; for other machines: {listed}"
    else:
        detail = f"{advertise_host} ({interface}) would be advertised; this machine has {listed}"
    yield Finding("address", "ok", detail)


def check_ports(ports: dict[int, str] = DEFAULT_PORTS) -> Iterator[Finding]:
    taken = [port for port in ports if _is_taken(port)]
    if taken:
        listed = " and ".join(f"{port} ({ports[port]})" for port in taken)
        advice = "if that is not your router: --client-address and --worker-address with other ports"
        yield Finding("ports", "warn", f"in use on loopback: {listed}", advice)
    else:
        yield Finding("ports", "ok", f"free on loopback: {', '.join(map(str, ports))}")


def check_huge_pages() -> Iterator[Finding]:
    # Measured on two cores: copies gain up to a third, and the first touch of a page takes less than half the
    # time. But it is a setting of the whole machine, so it is told, not judged.
    try:
        content = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        content = "[not there]"
    setting = content.partition("[")[2].partition("]")[0]
    pages = "huge" if setting in ("always", "within_size", "advise", "force") else "small"
    detail = f"transparent_hugepage/shmem_enabled is {setting}: the KV cache has {pages} pages"
    yield Finding("huge pages", "ok", detail)


def check_memory() -> Iterator[Finding]:
    available = available_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{format_bytes(available)} available to this process, {format_bytes(total)} in the machine"
    if available < KV_MEMORY_ON_CPU:
        advice = "give each worker less, for instance --kv-memory 30%"
        yield Finding("memory", "warn", f"{detail}: too little for the default KV cache of 4 GiB", advice)
    else:
        yield Finding("memory", "ok", detail)


def check_processor() -> Iterator[Finding]:
    flags: set[str] = set()
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags |= set(value.split())
        elif name.strip() == "model name":
            model = value.strip()
    cores = len(os.sched_getaffinity(0))
    fast = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    detail = f"{model}, {cores} {'core' if cores == 1 else 'cores'}"
    if fast:
        yield Finding("processor", "ok", f"{detail}, {', '.join(fast)}")
    else:
        advice = "--dtype float32 may be faster"
        yield Finding("processor", "warn", f"{detail}, without instructions for bfloat16", advice)


def check_numba_cache() -> Iterator[Finding]:
    from numba import njit

    from pdengine.transport import ucx_progress

    try:
        # Without a signature nothing is compiled; numba only looks for a folder that it can write.
        function = njit(cache=True)(ucx_progress.progress_until_news)
    except RuntimeError:
        advice = "let NUMBA_CACHE_DIR name a folder that can be written"
        yield Finding("numba cache", "warn", "cannot be written: each start compiles for seconds", advice)
        return
    yield Finding("numba cache", "ok", f"{function.stats.cache_path}")


def _try_transfer(advertise_host: str) -> TransferReport:
    """Run `transfer_check` in a process of its own."""
    command = [sys.executable, "-P", "-m", "pdengine.engine.transfer_check", advertise_host]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return TransferReport(error=f"a pull has not ended within {TRIAL_SECONDS:g} s")
    for line in reversed(trial.stdout.splitlines()):  # UCX logs to stdout, too
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=TransferReport)
    reason = (trial.stderr.strip().splitlines() or ["without a word"])[-1]
    ended = signal.Signals(-trial.returncode).name if trial.returncode < 0 else f"status {trial.returncode}"
    return TransferReport(error=f"a process that tried a pull ended with {ended}: {reason}")


def _usable_host(advertise_host: str) -> str:
    """`advertise_host`, or loopback where that is not of this machine, which `check_address` tells."""
    try:
        interface_of(advertise_host)
    except TransferError:
        return LOOPBACK_HOST
    return advertise_host


def _is_taken(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK_HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _version(text: str) -> tuple[int, int]:
    """`2.13.0+cpu` -> (2, 13)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
