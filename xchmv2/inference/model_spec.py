"""Names for models: what graphs carry, and what a warmed-up cluster told about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from xchmv2.model.config import CHMv2Config


@dataclass(frozen=True)
class ModelSpec:
    """A model, an arithmetic and a device, by name and content; small and hashable.

    Parameters
    ----------
    model : str
        Hub id, absolute folder, or ``live:`` and the content hash of a model in this process.
    revision : str or None
        Revision of a hub id.
    weights_sha256, config_sha256 : str
        Content of the weights and of the configuration files.
    device : str
        Torch device, or "auto" for what the worker has.
    dtype : {"float32", "bfloat16"}
        Arithmetic of the network.
    compile : bool
        Whether the network is compiled.
    """

    model: str
    revision: str | None
    weights_sha256: str
    config_sha256: str
    device: str
    dtype: str
    compile: bool = field(default=False, kw_only=True)

    @property
    def plain(self) -> ModelSpec:
        """The spec alone, without what a cluster told: it is this that goes into graphs."""
        return ModelSpec(
            self.model,
            self.revision,
            self.weights_sha256,
            self.config_sha256,
            self.device,
            self.dtype,
            compile=self.compile,
        )


@dataclass(frozen=True)
class WorkerReport:
    """What one dask worker said when it was warmed up.

    Parameters
    ----------
    name, host, address : str
        The worker, as its scheduler names it.
    device : str
        Torch device that it forwards on, such as "cpu" or "cuda:0".
    card : str or None
        Identity of its GPU, the same for all processes that use it; None on a processor.
    hardware : str
        The GPU's product name, or "processor".
    dask_threads, torch_threads : int
        Tasks that it runs at once, and threads of one forward on the processor.
    seconds : float
        Time that loading the model took [s]; near 0 where it was loaded before.
    """

    name: str
    host: str
    address: str
    device: str
    card: str | None
    hardware: str
    dask_threads: int
    torch_threads: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name} on {self.host}: {self.device} ({self.hardware}), "
            f"{self.dask_threads} dask threads, {self.torch_threads} torch threads, "
            f"loaded in {self.seconds:.1f} s"
        )


@dataclass(frozen=True, repr=False)
class WarmModel(ModelSpec):
    """A model that every forwarding worker of a cluster holds; pass it to ``predict``.

    Parameters
    ----------
    config : CHMv2Config
        The model's configuration, as the workers read it.
    workers : tuple of WorkerReport
        The workers that forward tiles.
    """

    config: CHMv2Config = field(compare=False)
    workers: tuple[WorkerReport, ...] = field(compare=False)

    def __repr__(self) -> str:
        head = f"<{self.model}, weights {self.weights_sha256[:12]}, {self.dtype}>"
        return "\n  ".join([head, *map(str, self.workers)])
