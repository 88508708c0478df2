"""Configuration of the model: fields, defaults and checks of the published CHMv2."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Unpack, cast, get_args

from xchmv2.errors import ConfigError
from xchmv2.model.files import CONFIG_NAME, HubOptions, find_folder, naming, read_json, write_json

_ReadoutType = Literal["ignore", "add", "project"]
BinsStrategy = Literal["linear", "log", "chmv2_mixlog"]
_NormStrategy = Literal["linear", "softmax", "sigmoid", "chmv2_mixlog"]
_HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
_CHOICES: dict[str, tuple[str, ...]] = {
    "readout_type": get_args(_ReadoutType),
    "bins_strategy": get_args(BinsStrategy),
    "norm_strategy": get_args(_NormStrategy),
    "hidden_act": _HIDDEN_ACTS,
}
# Where the smallest allowed value is neither 1 for a count nor 0 for a number.
_LEAST = {
    "num_register_tokens": 0,
    "fusion_hidden_size": 2,
    "rope_theta": 1e-6,
    "pos_embed_jitter": 1,
    "pos_embed_rescale": 1,
}
# The largest allowed value; of other counts it is the default. No array of these sizes overflows.
_MOST = {"num_hidden_layers": 1_000, "patch_size": 1_000, "min_depth": 1e6, "max_depth": 1e6}
_MOST_COUNT = 100_000
_RATES = ("attention_dropout", "drop_path_rate")


class _Settings:
    """A frozen dataclass of settings that a checkpoint keeps as JSON."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a configuration from a mapping, ignoring the keys it does not know.

        Parameters
        ----------
        data : mapping
            The content of a ``config.json``; missing keys take their defaults.

        Raises
        ------
        ConfigError
            If ``model_type`` names another model, or a value is not allowed.
        """
        found = data.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"model_type {cls.model_type!r}",
                repr(found),
                f"give a {cls.__name__} configuration",
            )
        known = {field.name for field in fields(cast(Any, cls))}
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers, strings and dicts, as ``config.json`` holds them."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(cast(Any, self))}
        return values | {"model_type": self.model_type}

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Read the ``config.json`` of a checkpoint.

        Parameters
        ----------
        id_or_folder : str or path
            Hub id, or folder with ``config.json``.
        revision : str, optional
            Branch, tag or commit on the hub.
        **hub
            ``token``, ``cache_dir``, ``local_files_only`` and ``subfolder``, as in
            `CHMv2ForDepthEstimation.from_pretrained`.

        Raises
        ------
        CheckpointError
            If the file is missing or is not a JSON object.
        ConfigError
            If a value is not allowed; the message names file and field.
        """
        path = find_folder(id_or_folder, revision, [CONFIG_NAME], **hub)[0] / CONFIG_NAME
        data = read_json(path)
        with naming(path):
            return cls.from_dict(data)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` into a folder, which is made if it does not exist."""
        write_json(Path(folder) / CONFIG_NAME, self.to_dict())


@dataclass(frozen=True, kw_only=True)
class CHMv2Config(_Settings):
    """Settings of CHMv2: backbone, dense prediction head, and bins of height.

    Parameters
    ----------
    backbone_config : DINOv3ViTConfig, mapping or None
        The backbone; a mapping is completed from the defaults of `DINOv3ViTConfig`; ``None`` is
        the published ViT-L/16 with stages 6, 12, 18 and 24. The DINOv3ViTConfig of transformers
        is taken too.
    patch_size : int
        Published setting without effect; the backbone's own ``patch_size`` counts.
    initializer_range : float
        Standard deviation of the head's initial weights.
    reassemble_factors : sequence of float
        Scale of each stage relative to the patch grid: whole numbers, or fractions below 1.
    post_process_channels : sequence of int
        Channels of each stage after reassembling, one per stage of the backbone.
    fusion_hidden_size, head_hidden_size : int
        Channels during fusion, and before the last projection.
    number_output_channels : int
        Number of bins; 1 means plain regression.
    readout_type : {"ignore", "add", "project"}
        How the class token enters the patch tokens.
    min_depth, max_depth : float
        Range of heights [m].
    bins_strategy : {"linear", "log", "chmv2_mixlog"}
        How bin centres are spaced.
    norm_strategy : {"linear", "softmax", "sigmoid", "chmv2_mixlog"}
        How logits become weights of the bins.

    Raises
    ------
    ConfigError
        If a value is not allowed.

    References
    ----------
    CHMv2, arXiv 2603.06382; DPT, arXiv 2103.13413.
    """

    model_type: ClassVar[str] = "chmv2"

    backbone_config: DINOv3ViTConfig | Mapping[str, Any] | None = None
    patch_size: int | Sequence[int] = 16
    initializer_range: float = 0.02
    reassemble_factors: Sequence[float] = (4, 2, 1, 0.5)
    post_process_channels: Sequence[int] = (128, 256, 512, 1024)
    fusion_hidden_size: int = 256
    head_hidden_size: int = 128
    number_output_channels: int = 256
    readout_type: _ReadoutType = "project"
    min_depth: float = 0.001
    max_depth: float = 96.0
    bins_strategy: BinsStrategy = "chmv2_mixlog"
    norm_strategy: _NormStrategy = "chmv2_mixlog"

    def __post_init__(self) -> None:
        object.__setattr__(self, "backbone_config", _as_backbone(self.backbone_config))
        for name in ("reassemble_factors", "post_process_channels"):
            if getattr(self, name) is None:  # how the published signature says "default"
                object.__setattr__(self, name, getattr(type(self), name))
        _normalise_fields(self)
        _check_fields(self)
        self._check_stages()
        self._check_depths()

    @property
    def backbone(self) -> DINOv3ViTConfig:
        """The backbone's configuration, completed."""
        return cast(DINOv3ViTConfig, self.backbone_config)

    def _check_stages(self) -> None:
        stages = len(self.backbone.stages)
        channels, factors = self.post_process_channels, self.reassemble_factors
        _check_list("post_process_channels", channels)
        _check_list("reassemble_factors", factors)
        if len(channels) != stages or len(factors) < stages:
            raise ConfigError(
                "one post_process_channels and reassemble_factors entry per stage of the backbone",
                f"{stages} stages, {len(channels)} channels, {len(factors)} factors",
                "give lists of equal length to out_indices",
            )
        for channel in channels:
            _check_number("post_process_channels", channel, whole=True, least=1)
        for factor in map(_as_float, factors):
            if not (1e-3 <= factor < 1 or (1 <= factor <= 1_000 and factor.is_integer())):
                raise ConfigError(
                    "reassemble_factors as whole numbers, or fractions between 0 and 1",
                    repr(list(factors)),
                    "use the published [4, 2, 1, 0.5]",
                )
        self._check_outputs()

    def _check_outputs(self) -> None:
        if not (self.backbone.return_class_token and self.backbone.reshape_hidden_states):
            raise ConfigError(
                "a backbone with return_class_token=True and reshape_hidden_states=True",
                f"{self.backbone.return_class_token} and {self.backbone.reshape_hidden_states}",
                "set both: the head reads class tokens and maps",
            )

    def _check_depths(self) -> None:
        takes_log = self.bins_strategy != "linear" and self.number_output_channels > 1
        if not ((self.min_depth >= 1e-6 or not takes_log) and self.min_depth < self.max_depth):
            raise ConfigError(
                "1e-6 <= min_depth < max_depth (0 itself only with bins_strategy='linear')",
                f"min_depth={self.min_depth}, max_depth={self.max_depth}",
                "use the published 0.001 and 96.0",
            )


def _as_backbone(value: Any) -> DINOv3ViTConfig:
    if value is None:
        return _default_backbone()
    if isinstance(value, DINOv3ViTConfig):
        return value
    found = value if isinstance(value, Mapping) else published_settings(value)
    if found is not None:
        return DINOv3ViTConfig.from_dict(found)
    raise ConfigError(
        "backbone_config as a dict, a DINOv3ViTConfig or None",
        type(value).__name__,
        "pass DINOv3ViTConfig(...)",
    )


def published_settings(config: Any) -> Mapping[str, Any] | None:
    """Return the settings in a configuration object of transformers; None for other objects."""
    is_one = isinstance(getattr(config, "model_type", None), str) and not isinstance(config, type)
    return config.to_dict() if is_one else None


def _default_backbone() -> DINOv3ViTConfig:
    """ViT-L/16, the backbone of the published CHMv2."""
    return DINOv3ViTConfig(
        image_size=416,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        num_register_tokens=4,
        key_bias=True,
        out_indices=(6, 12, 18, 24),
        layer_norm_eps=1e-6,
        return_class_token=True,
    )


@dataclass(frozen=True, kw_only=True)
class DINOv3ViTConfig(_Settings):
    """Settings of the DINOv3 vision transformer.

    Names and defaults are the published ones (ViT-S/16). A dict with some of them, given as
    ``backbone_config``, is completed from these defaults, not from CHMv2's.

    Parameters
    ----------
    patch_size, image_size : int or pair of int
        Side of a patch and of the training image [px]; a pair is (height, width).
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_channels : int
        Width of a token, width inside the MLP, number of blocks, of heads, of image bands.
    hidden_act : str
        Activation of the MLP: "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"
        or "swish".
    attention_dropout, drop_path_rate : float
        Probabilities, in training only.
    initializer_range, layerscale_value : float
        Standard deviation of initial weights, and initial layer scale.
    layer_norm_eps, rope_theta : float
        Epsilon of the norms, and base period of the rotary position embedding.
    query_bias, key_bias, value_bias, proj_bias, mlp_bias, use_gated_mlp : bool
        Which linear layers have a bias, and whether the MLP is gated (SwiGLU).
    num_register_tokens : int
        Extra tokens beside the class token.
    pos_embed_shift, pos_embed_jitter, pos_embed_rescale : float or None
        Strength of the random changes to patch coordinates in training; ``None`` for none.
    apply_layernorm : bool
        Whether the stages returned are normalised; the last stage always is.
    reshape_hidden_states, return_class_token : bool
        Form of the published backbone's output; CHMv2 needs both true.
    out_indices, out_features : sequence or None
        Stages returned, by index (0 is the embedding) or name ("stem", "stage1", ...).
        Each is derived from the other; the default is the last stage.

    Raises
    ------
    ConfigError
        If a value is not allowed.

    References
    ----------
    DINOv3, arXiv 2508.10104.
    """

    model_type: ClassVar[str] = "dinov3_vit"

    patch_size: int | Sequence[int] = 16
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    image_size: int | Sequence[int] = 224
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_gated_mlp: bool = False
    num_register_tokens: int = 0
    pos_embed_shift: float | None = None
    pos_embed_jitter: float | None = None
    pos_embed_rescale: float | None = 2.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    return_class_token: bool = False
    out_indices: Sequence[int] | None = None
    out_features: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _normalise_fields(self)
        _check_fields(self)
        self._check_heads()
        self._align_stages()

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch [px]."""
        size = self.patch_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def stages(self) -> tuple[int, ...]:
        """Indices of the hidden states returned, from 0 (the embedding), ascending."""
        count = self.num_hidden_layers + 1
        return tuple(index % count for index in self.out_indices or ())

    def _check_heads(self) -> None:
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ConfigError(
                "hidden_size as a multiple of 4 * num_attention_heads",
                f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}",
                "choose sizes whose head_dim is a multiple of 4 (rotary position embedding)",
            )

    def _align_stages(self) -> None:
        names = ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]
        indices, features = self.out_indices, self.out_features
        for name in ("out_indices", "out_features"):
            if getattr(self, name) is not None:
                _check_list(name, getattr(self, name))
        if indices is None:
            wanted = names[-1:] if features is None else features
            unknown = [name for name in wanted if name not in names]
            if unknown:
                raise ConfigError(f"out_features from {names}", repr(unknown), "use these names")
            indices = _FrozenList(names.index(name) for name in wanted)
        _check_indices(indices, len(names))
        derived = [names[index] for index in indices]
        if features is not None and list(features) != derived:
            raise ConfigError(
                f"out_features {derived} for out_indices {list(indices)}",
                repr(list(features)),
                "give only one of them; the other is derived",
            )
        object.__setattr__(self, "out_indices", _FrozenList(indices))
        object.__setattr__(self, "out_features", _FrozenList(derived))


class _FrozenList(tuple[Any, ...]):
    """A tuple that equals the list of the same values, as the published defaults are lists."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


def _plain(value: Any) -> Any:
    if isinstance(value, _Settings):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _normalise_fields(config: Any) -> None:
    """Bring equal settings to one form: hashable lists, and floats where floats are meant.

    The published implementation refuses an integer for a float in ``config.json``.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list | tuple):
            object.__setattr__(config, field.name, _FrozenList(value))
        elif str(field.type).startswith("float") and type(value) is int:
            object.__setattr__(config, field.name, _as_float(value))


def _check_fields(config: Any) -> None:
    """Check every setting against its annotation, its choices and its limits."""
    for field in fields(config):
        name, value, kind = field.name, getattr(config, field.name), str(field.type)
        if name in _CHOICES:
            _check_choice(name, value, _CHOICES[name])
        elif kind == "bool":
            _check_choice(name, value, (True, False))
        elif kind.startswith(("int", "float")) and not ("None" in kind and value is None):
            for item in _items(name, value, kind):
                _check_number(name, item, whole="int" in kind, least=_LEAST.get(name))


def _items(name: str, value: Any, kind: str) -> Iterable[Any]:
    if "Sequence" not in kind or not isinstance(value, tuple):
        return (value,)
    if len(value) != 2:
        raise ConfigError(f"{name} as one whole number or two", repr(value), "give (height, width)")
    return value


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise ConfigError(
            f"{name} as one of {', '.join(map(repr, allowed))}", repr(value), "use one of these"
        )


def _check_number(name: str, value: Any, *, whole: bool, least: float | None) -> None:
    """Check that a number is finite, in its range, whole if need be, and a rate below 1."""
    least = least if least is not None else 1 if whole else 0
    most = _MOST.get(name, _MOST_COUNT if whole else math.inf)
    number = _as_float(value)
    fits = math.isfinite(number) and least <= number <= most
    if not fits or (whole and not isinstance(value, int)) or (name in _RATES and number >= 1):
        kind = "a whole number" if whole else "a finite number"
        below = " and below 1" if name in _RATES else f" and at most {most:g}" * (number > most)
        raise ConfigError(
            f"{name} as {kind} of at least {least:g}{below}",
            repr(value),
            f"leave {name} out for its default",
        )


def _as_float(value: Any) -> float:
    """Return a number as float, and NaN for anything else (booleans too)."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if numeric else math.nan
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _check_list(name: str, value: Any) -> None:
    """Check that a value is a list, before its items are read."""
    if not isinstance(value, _FrozenList):
        raise ConfigError(f"{name} as a list", repr(value), f"write {name}=[...]")


def _check_indices(indices: Sequence[int], count: int) -> None:
    """Check that stages exist, are different and ascend."""
    valid = all(type(i) is int and -count <= i < count for i in indices)
    places = [i % count for i in indices] if valid else []
    if not places or sorted(set(places)) != places:
        raise ConfigError(
            f"out_indices as ascending, different numbers from 0 to {count - 1}",
            repr(list(indices)),
            "count stages from 0 (the embedding); num_hidden_layers is the last",
        )
