"""The chips that can be planned for: the speeds of TPUs and GPUs, and XLA's descriptions of GPUs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

GIB = 2**30

Arithmetic = str
"""The arithmetic of products: "bfloat16", or "float32" with XLA's precision "default", "high" or "highest", such as
"float32 highest"."""


class Chip(NamedTuple):
    """The speed and memory of one chip."""

    speeds: Mapping[Arithmetic, float]
    """The operations per second by the arithmetic of the products."""
    bandwidth: float
    """The bytes per second between the chip and its memory."""
    memory: float
    """The bytes of the chip's memory that a program can use."""
    links: float
    """The bytes per second that the chip sends to other chips of its host, or on a TPU to those of its slice."""
    network: float | None = None
    """The bytes per second that the chip sends to other hosts, or on a TPU to other slices; None: not known."""
    target: str | None = None
    """XLA's description of a GPU (`GpuTargetConfigProto`, as text); None for a TPU."""
    largest: tuple[int, ...] = ()
    """The sides of the largest slice of TPUs, the shortest first."""
    configuration: str = "default"
    """The name of libtpu's configuration of the chip. With `megacore`, the two cores of a v4 chip are one device."""


def tpu(flops: float, bandwidth: float, memory: float, **others: Any) -> Chip:
    """Returns a TPU that computes `flops` operations per second in bfloat16. `memory` is in GiB.

    A product of float32 numbers is one product of bfloat16 numbers at default precision, three at high, six at highest.
    """
    speeds = {"bfloat16": flops, "float32 default": flops, "float32 high": flops / 3, "float32 highest": flops / 6}
    return Chip(speeds, bandwidth, memory * GIB, **others)


class Gpu(NamedTuple):
    """The figures of a GPU that XLA needs to compile for it."""

    name: str
    capability: int
    """The major number of the compute capability."""
    cores: int
    """The number of multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    memory: int
    """The memory of the GPU in bytes."""
    bandwidth: int
    """The bytes per second between the GPU and its memory."""
    cache: int
    """The second-level cache in bytes."""
    shared_memory: int
    """The shared memory of a multiprocessor in bytes. A block can have all of it but 1024 bytes."""

    @property
    def target(self) -> str:
        """XLA's description of the GPU: a `GpuTargetConfigProto` as text."""
        features = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} feature_extension: {features} }}
              core_count: {self.cores}
              fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_block: 49152
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}"""


JAX_TAKES = 0.75
"""The part of a GPU's memory that JAX takes for itself, unless the variable XLA_CLIENT_MEM_FRACTION says otherwise."""


def gpu(facts: Gpu, flops: float, tf32: float, fp32: float, links: float, network: float) -> Chip:
    """Returns a GPU that computes `flops` operations per second in bfloat16, `tf32` in TF32 and `fp32` in float32.

    XLA lets NVIDIA's libraries compute a product of float32 numbers in TF32 at default and at high precision.
    """
    speeds = {"bfloat16": flops, "float32 default": tf32, "float32 high": tf32, "float32 highest": fp32}
    return Chip(speeds, float(facts.bandwidth), JAX_TAKES * facts.memory, links, network, facts.target)


A100 = Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85100068864, 2039040000000, 41943040, 167936)
A100_40GB = A100._replace(name="NVIDIA A100-SXM4-40GB", memory=42331013120, bandwidth=1555200000000)
H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84942979072, 3352320000000, 52428800, 233472)
H200 = H100._replace(name="NVIDIA H200 141GB HBM3e", memory=151397597184, bandwidth=4800000000000)

_A100 = {"flops": 312e12, "tf32": 156e12, "fp32": 19.5e12, "links": 300e9, "network": 25e9}
_H100 = {"flops": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "links": 450e9, "network": 50e9}

TPUS = {
    "v4": tpu(275e12, 1228e9, 30.75, links=300e9, largest=(16, 16, 16), configuration="megacore"),
    "v5e": tpu(197e12, 819e9, 15.75, links=200e9, network=3.125e9, largest=(16, 16)),
    "v5p": tpu(459e12, 2765e9, 95.74, links=600e9, network=6.25e9, largest=(16, 20, 28)),
    "v6e": tpu(918e12, 1640e9, 31.25, links=400e9, largest=(16, 16)),
}
"""The TPU chips by name. Source of speeds and largest slices: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. In the
network between slices, a chip has its share of the pod's 6.4 Tbit/s (v5e), or 50 Gbit/s (v5p). The memory is what
libtpu 0.0.42 reports as available when a program does not fit."""
GPUS = {
    "a100": gpu(A100, **_A100),
    "a100-40gb": gpu(A100_40GB, **_A100),
    "h100": gpu(H100, **_H100),
    "h200": gpu(H200, **_H100),
}
"""The GPUs by name, all with NVLink (SXM). Source of XLA's figures: the files a100_sxm_80, a100_sxm_40, h100_sxm
and h200 in xla/backends/gpu/target_config/specs of github.com/openxla/xla (Apache-2.0). Source of the speeds, without
sparsity, and of the links: NVIDIA's data sheets of A100, H100 and H200. The network is that of NVIDIA's DGX A100 and
DGX H100, which have an adapter of 200 and of 400 Gbit/s for each GPU."""
