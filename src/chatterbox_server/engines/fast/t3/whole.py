"""T3's layers in one launch, for up to eight rows: compiles ``whole.cu`` and launches it; says where it cannot.

The kernel is CUDA C++, for it wants what Triton does not say: weights that go on arriving while programs wait for each
other. NVRTC and the driver are called through ``cuda.bindings``, which torch itself needs on Linux.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from chatterbox_server.engines.fast.t3.backbone import Backbone
from chatterbox_server.engines.fast.t3.slots import Slots

PROGRAMS: Final = 128
THREADS: Final = 640
ROWS: Final = (1, 2, 4, 8)
"""Rows and the splits of their attention are the eight columns of a tensor core's product."""
SHARED_BYTES: Final = 232_448
"""Of a program at most, by compute capability 9.0 and 10.0 (CUDA C++ Programming Guide, technical specifications)."""
SPINS: Final = 1_000_000
"""Of a wait that is bounded: about a second."""

_WHAT = ("its weights", "room for weights", "the stream", "queries", "attention", "the stream in between", "the raised")


class Told(ctypes.Structure):
    """What ``whole.cu`` calls the same."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "rows", "at", "cos", "sin", "layers", "head", "keys", "values")),
        *((name, ctypes.c_longlong) for name in ("layer_stride", "row_stride", "head_stride")),
        *((name, ctypes.c_void_p) for name in ("before", "between", "turned", "found", "weighed", "raised")),
        *((name, ctypes.c_void_p) for name in ("logits", "launches", "watched", "scores")),
        ("positions", ctypes.c_longlong),
        ("stuck", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


def ring(m: int) -> tuple[int, int]:
    """Groups of eight rows' weights that a program keeps on their way, and its bytes of shared memory in all."""
    group = 8 * (2048 + 64) + 2 * 8
    rest = 2 * m * 65 * 20 * 4 + 16 * 72 * 4 + 12 * m * 32
    groups = min(12, (SHARED_BYTES - rest) // group)
    return groups, groups * group + rest


def unfit(backbone: Backbone, m: int, vocabulary: int) -> str | None:
    """What of a model, or of so many rows, this kernel was not written for; ``None``: nothing."""
    layer, tail = backbone.layers[0], vocabulary - 64 * PROGRAMS
    right = {
        "a Llama": backbone.gated and backbone.cos is not None,
        "bfloat16": backbone.dtype == torch.bfloat16,
        "16 heads of 64": (backbone.heads, backbone.head_dim, backbone.dim) == (16, 64, 1024),
        "a feed-forward net of 4096": tuple(layer.up.shape) == (8192, 1024) and tuple(layer.down.shape) == (1024, 4096),
        "8,192 to 9,216 tokens": 0 <= tail <= 8 * PROGRAMS,
        "no biases": all(one is None for one in (layer.qkv_bias, layer.out_bias, backbone.head_bias)),
        "1, 2, 4 or 8 rows": m in ROWS,
    }
    wrong = [what for what, so in right.items() if not so]
    return f"one launch for all layers needs {', '.join(wrong)}" if wrong else None


def unfit_gpu(
    *, capability: tuple[int, int], multiprocessors: int, shared_bytes: int, cooperative: bool, mps: bool
) -> str | None:
    """What of a GPU, or of the part of it that this process may use.

    ``mps``: other processes may compute at the same time. Of two such kernels each could hold what the other waits for.
    """
    if capability < (9, 0):
        return f"one launch for all layers needs compute capability 9.0, this GPU has {'.'.join(map(str, capability))}"
    if multiprocessors < PROGRAMS:
        return f"one launch for all layers needs {PROGRAMS} multiprocessors, there are {multiprocessors}"
    if shared_bytes < SHARED_BYTES:
        return f"one launch for all layers needs {SHARED_BYTES} bytes of shared memory, there are {shared_bytes}"
    if mps:
        return "one launch for all layers needs the GPU for itself, and MPS shares it"
    return None if cooperative else "one launch for all layers needs cooperative launches"


def options(m: int, vocabulary: int, layers: int, *, watched: int, bounded: bool) -> tuple[str, ...]:
    """For a compiler, whichever."""
    groups, shared_bytes = ring(m)
    told = {"M": m, "V": vocabulary, "LAYERS": layers, "WATCHED": watched, "RING": groups, "SHARED_BYTES": shared_bytes}
    if bounded:
        told["BOUNDED"] = SPINS
    return tuple(f"-D{name}={value}" for name, value in told.items())


@dataclass(frozen=True, slots=True)
class Buffers:
    """What one launch leaves to the next. Zeros at first, and nobody else's."""

    told: Told
    stuck: torch.Tensor
    _kept: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls,
        slots: Slots,
        *,
        x: torch.Tensor,
        rows: torch.Tensor,
        at: torch.Tensor,
        logits: torch.Tensor,
        scores: torch.Tensor,
        heads: Sequence[tuple[int, int]],
    ) -> "Buffers":
        """``scores`` are of ``heads``, each a layer and one of its heads; the others are a ``Stepper``'s."""
        backbone, cache, device = slots.backbone, slots.cache, slots.device
        m = len(x)
        layers = torch.tensor([[one.data_ptr() for one in (at.qkv, at.out, at.up, at.down)] for at in backbone.layers])
        watched = torch.full((len(backbone.layers), backbone.heads), -1, dtype=torch.int32)
        for which, (layer, head) in enumerate(heads):
            watched[layer, head] = which
        layers, watched = layers.to(device), watched.to(device)
        # Packets of 16 bytes; before, between, turned, found, weighed, raised, launches, stuck.
        sizes = (256 * m, 256 * m, 768 * m, 1024, PROGRAMS // 2, 512 * m, 1, 1)
        packets = torch.zeros(sum(sizes), 4, dtype=torch.int32, device=device).split(sizes)
        names = ("before", "between", "turned", "found", "weighed", "raised", "launches", "stuck")
        given = {"x": x, "rows": rows, "at": at, "cos": backbone.cos, "sin": backbone.sin, "layers": layers}
        given |= {"head": backbone.head, "keys": cache.keys, "values": cache.values, "logits": logits}
        given |= {"watched": watched, "scores": scores} | dict(zip(names, packets, strict=True))
        strides = dict(zip(("layer_stride", "row_stride", "head_stride"), cache.keys.stride()[:3], strict=True))
        pointers = {name: one.data_ptr() for name, one in given.items() if one is not None}
        told = Told(**pointers, **strides, positions=cache.positions, eps=backbone.eps)
        return cls(told, packets[-1].view(-1), tuple(one for one in given.values() if one is not None))


class Whole:
    """All layers of a step, from ``x`` to ``logits``."""

    def __init__(self, loaded: "_Loaded", buffers: Buffers, m: int) -> None:
        self._loaded, self._buffers = loaded, buffers
        self._shared_bytes = ring(m)[1]
        # The driver takes addresses of arguments: here, of the only one.
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffers.told))

    def __call__(self) -> None:
        """On torch's stream; it may be capturing.

        Raises:
            LaunchRefused: by the driver.
        """
        self._loaded.launch(ctypes.addressof(self._arguments), self._shared_bytes)

    @property
    def stuck(self) -> str | None:
        """Where a bounded wait was given up first, since it was there. Waits for the GPU."""
        whether, place, program, warp = self._buffers.stuck.tolist()
        if not whether:
            return None
        return f"program {program}, warp {warp}, layer {place // 8}: waited in vain for {_WHAT[place % 8]}"


def of(slots: Slots, *, bounded: bool = False, **told: Any) -> Whole | str:
    """The kernel for a ``Stepper``'s tensors, as ``Buffers.of`` is told of them; or, in words, why there is none.

    ``bounded``: no wait is for ever; what comes of a step in which one was given up is wrong, see ``stuck``.
    """
    m = len(told["x"])
    reason = unfit(slots.backbone, m, slots.vocabulary)
    if reason is not None:
        return reason
    if slots.device.type != "cuda":
        return "one launch for all layers needs a GPU"
    heads = told["heads"]
    how = options(m, slots.vocabulary, len(slots.backbone.layers), watched=len(heads), bounded=bounded)
    loaded = _loaded(slots.device.index or 0, how, ring(m)[1])
    return loaded if isinstance(loaded, str) else Whole(loaded, Buffers.of(slots, **told), m)


@dataclass(frozen=True, slots=True)
class _Loaded:
    driver: Any
    function: Any
    device: int

    def launch(self, arguments: int, shared_bytes: int) -> None:
        driver = self.driver
        # All programs are there at once, or none: they wait for each other.
        value = driver.CUlaunchAttributeValue()
        value.cooperative = 1
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX = PROGRAMS, THREADS
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream(self.device).cuda_stream)
        config.attrs, config.numAttrs = [attribute], 1
        _answered(driver.cuLaunchKernelEx(config, self.function, arguments, 0))


class LaunchRefused(Exception):
    """What NVRTC or the driver says."""


@functools.cache
def _loaded(device: int, how: tuple[str, ...], shared_bytes: int) -> _Loaded | str:
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        return f"one launch for all layers needs cuda.bindings: {error}"
    try:
        # The context that torch works in.
        torch.cuda.synchronize(device)
        _answered(driver.cuInit(0))
        handle = _answered(driver.cuDeviceGet(device))
        context = _answered(driver.cuDevicePrimaryCtxRetain(handle))
        _answered(driver.cuCtxSetCurrent(context))

        def attribute(name: str) -> int:
            which = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(_answered(driver.cuDeviceGetAttribute(which, handle)))

        capability = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
        reason = unfit_gpu(
            capability=capability,
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            cooperative=attribute("COOPERATIVE_LAUNCH") == 1,
            mps="CUDA_MPS_PIPE_DIRECTORY" in os.environ or _by_mps(driver, handle),
        )
        if reason is not None:
            return reason
        code = _compiled(nvrtc, ("--std=c++17", f"--gpu-architecture=sm_{capability[0]}{capability[1]}a", *how))
        module = _answered(driver.cuModuleLoadData(code))
        function = _answered(driver.cuModuleGetFunction(module, b"whole"))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _answered(driver.cuFuncSetAttribute(function, most, shared_bytes))
        fits = _answered(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, shared_bytes))
    except (LaunchRefused, RuntimeError) as error:
        return f"one launch for all layers cannot be compiled here: {error}"
    if not fits:
        return "one launch for all layers does not fit this GPU's multiprocessors"
    return _Loaded(driver, function, device)


def _by_mps(driver: Any, handle: Any) -> bool:
    """Whether the driver says so; not all of them are asked."""
    which = getattr(driver.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_MPS_ENABLED", None)
    error, enabled = (1, 0) if which is None else driver.cuDeviceGetAttribute(which, handle)
    return int(error) == 0 and int(enabled) == 1


def _compiled(nvrtc: Any, how: Sequence[str]) -> bytes:
    source = Path(__file__).with_suffix(".cu")
    program = _answered(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    try:
        _answered(nvrtc.nvrtcCompileProgram(program, len(how), [one.encode() for one in how]))
    except LaunchRefused as error:
        log = b" " * _answered(nvrtc.nvrtcGetProgramLogSize(program))
        _answered(nvrtc.nvrtcGetProgramLog(program, log))
        msg = f"{error}: {log.rstrip(bytes(1)).decode(errors='replace')}"
        raise LaunchRefused(msg) from None
    code: bytes = b" " * _answered(nvrtc.nvrtcGetCUBINSize(program))
    _answered(nvrtc.nvrtcGetCUBIN(program, code))
    return code


def _answered(answer: tuple[Any, ...]) -> Any:
    """What a call of ``cuda.bindings`` gives, if anything."""
    error, *rest = answer
    if int(error) != 0:
        raise LaunchRefused(getattr(error, "name", str(error)))
    return rest[0] if rest else None
