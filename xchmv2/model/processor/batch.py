"""The processor's output: a mapping that unpacks into the model's arguments."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch

from xchmv2.errors import ConfigError, ImageryError


class BatchFeature(UserDict[str, Any]):
    """A batch for the model: a mapping whose entries are attributes too.

    Parameters
    ----------
    data : mapping, optional
        ``pixel_values`` (and ``labels`` where segmentation maps were given): an array of the
        whole batch, or a list with one tensor per image.

    Examples
    --------
    >>> batch = BatchFeature({"pixel_values": torch.zeros(1, 3, 32, 32)})
    >>> batch.pixel_values is batch["pixel_values"]
    True
    >>> sorted({**batch})
    ['pixel_values']
    """

    def __getattr__(self, name: str) -> Any:
        # ``data`` is missing only while an instance is being unpickled or copied.
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(f"{type(self).__name__} has no entry or attribute {name!r}")

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BatchFeature:
        """Move every tensor to a device, convert the floating point ones, and return self.

        Parameters
        ----------
        device : torch.device, str or int, optional
            Where to; a dtype may stand here too, as in ``torch.Tensor.to``.
        dtype : torch.dtype, optional
            For floating point tensors; labels keep their integers.
        non_blocking : bool, default False
            Copy asynchronously from pinned memory.

        Returns
        -------
        BatchFeature
            This object, changed.

        Raises
        ------
        ConfigError
            If the first argument is neither a device nor a dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if not isinstance(device, torch.device | str | int | None):
            raise ConfigError("a device or a torch dtype", repr(device), "write .to('cuda')")

        def move(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(move(item) for item in value)
            if not isinstance(value, torch.Tensor):
                return value
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted, non_blocking=non_blocking)

        self.data = {name: move(value) for name, value in self.data.items()}
        return self


def collate(tensors: list[torch.Tensor], return_tensors: str | None) -> Any:
    """Stack the images of a batch in the form asked for.

    Parameters
    ----------
    tensors : list of torch.Tensor
        One per image, each (channels, height, width) or (height, width).
    return_tensors : {"pt", "np"} or None
        A torch tensor, a numpy array, or the list as it is.

    Returns
    -------
    torch.Tensor, numpy.ndarray or list of torch.Tensor
        With the image as first dimension.

    Raises
    ------
    ImageryError
        If images of different sizes are to be stacked.
    """
    if return_tensors is None:
        return tensors
    shapes = sorted({tuple(tensor.shape) for tensor in tensors})
    if len(shapes) > 1:
        raise ImageryError(
            "images that have one size after processing, to stack them",
            f"sizes {', '.join(str(shape) for shape in shapes)}",
            "pass return_tensors=None for a list, or bring them to one size with "
            "do_center_crop=True, crop_size=(height, width)",
        )
    batch = torch.stack(tensors)  # [B, ...]
    return batch if return_tensors == "pt" else batch.numpy(force=True)
