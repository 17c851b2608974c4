"""OmniCodec (arXiv 2603.20638) in plain PyTorch, to encode and decode: one semantic and many acoustic codebooks.

    audio [B, 1, T] ─ encoder ─ transformer ─ ↓2 ─ e ──(−)─ acoustic RVQ ─(+)─ ↑2 ─ transformer ─ decoder ─ audio
                                                        │                  │
                                                    adapter 1          adapter 2
                                                        └────────┬─────────┘
    features [B, S, F] ─ transformer ─ interpolate ─ semantic VQ, 1 codebook

B batch, T samples, N frames = ceil(T / frame_size), K codebooks, S semantic feature vectors, D hidden size, C channels.
Convolutions take [B, C, T], everything else [B, T, C]. Modules have the names of the authors' checkpoint, so that its
state dict is that of this model; hence `conv.conv` and `vq.layers.0._codebook`.

Convolutions and matrix products compute in the dtype of their weights. Norms, rotations, residual streams of the
transformers, codebooks, the log-mel and the convolutions from and to audio are float32 in a bfloat16 model, too.
torch.autocast changes nothing: which numbers are coarse is the model's choice, as codes depend on it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_omnicodec import OmniCodecConfig

Cache = dict[str, Tensor]
"""The state that a stream carries from one call to the next: a tensor [B, …] for each layer, by its name. Zeros begin a
stream, and a row that is set to zero begins anew while the others go on."""


Size = Any
"""A number of steps: an integer, or a symbol while the model is exported for any length."""


@dataclass
class OmniCodecOutput(ModelOutput):
    """Codes [B, K, N] and the audio [B, 1, T] that they decode to."""

    audio_codes: Tensor | None = None
    audio_values: Tensor | None = None


@dataclass
class OmniCodecEncoderOutput(ModelOutput):
    """Codes [B, K, N] of the first K codebooks; 0 past the last frame of a row."""

    audio_codes: Tensor | None = None


@dataclass
class OmniCodecDecoderOutput(ModelOutput):
    """Audio [B, 1, N · frame_size], float32, and the cache that the next call of a stream takes."""

    audio_values: Tensor | None = None
    decoder_cache: Cache | None = None


# -- Layers. In a stream they find what came before in the cache, and leave there what the next call needs. The model
# gives each layer its name in the cache.


LOUDEST = 100.0
"""Peak above which samples are on another scale than ±1."""
VECTOR_RATE = 12.75
"""Semantic feature vectors of a second: between 12.5 (log-mel, Whisper) and 13 (Qwen3-Omni)."""


def ceil_div(number: Any, divisor: int) -> Any:
    """Divides and rounds up. Of negative numbers, exported programs do not take the floor, so there are none here."""
    return (number + divisor - 1) // divisor


def has_values(x: Tensor) -> bool:
    """Says whether values can be looked at: neither while a program is traced nor on the device meta."""
    return not (x.is_meta or torch.compiler.is_compiling())


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a method compute in the dtypes of its tensors where the caller has turned autocast on."""

    @functools.wraps(method)
    def computed(model: nn.Module, x: Tensor, *others: Any) -> Any:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return method(model, x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return method(model, x, *others)

    return computed


class CacheUser(nn.Module):
    """A layer with a place in the cache."""

    cache_name = ""

    def past(self, x: Tensor, steps: int, cache: Cache | None) -> Tensor:
        """Returns the `steps` steps before x [B, …, T]: zeros, or those of the stream."""
        past = None if cache is None else cache.get(self.cache_name)
        past = x.new_zeros(*x.shape[:-1], steps) if past is None else past
        if cache is not None:
            cache[self.cache_name] = torch.cat([past, x], dim=-1)[..., x.shape[-1] :]
        return past


class KeptFloat32(nn.Module):
    """A module whose tensors stay float32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class OmniCodecLinear(nn.Linear):
    """A linear layer that computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


class OmniCodecLayerNorm(nn.LayerNorm):
    """A layer norm in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class OmniCodecConv1d(CacheUser):
    """A convolution whose outputs depend on the past alone: [B, C, T] → [B, O, ceil(T / stride)].

    Before the first step lie zeros, and after the last one too, where T is no multiple of the stride; with `replicate`
    the first and the last step are repeated instead.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        replicate: bool = False,
        float32: bool = False,
    ):
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel_size, stride, dilation=dilation, bias=bias)
        self.conv = nn.ModuleDict({"conv": conv})
        self.stride, self.left = stride, (kernel_size - 1) * dilation + 1 - stride
        self.replicate, self.float32 = replicate, float32

    def forward(self, x: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Convolves x; `lengths` [B] are the valid steps of each row, and what follows them is ignored."""
        conv: Any = self.conv["conv"]
        dtype = torch.float32 if self.float32 else conv.weight.dtype
        x = x.to(dtype)
        if self.stride > 1:
            x = self._fill_last_window(x, lengths)
        if self.left:
            past = x[..., :1].expand(-1, -1, self.left) if self.replicate else self.past(x, self.left, cache)
            x = torch.cat([past, x], dim=-1)
        bias = None if conv.bias is None else conv.bias.to(dtype)
        return F.conv1d(x, conv.weight.to(dtype), bias, self.stride, dilation=conv.dilation)

    def _fill_last_window(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        steps = x.shape[-1]
        total = ceil_div(steps, self.stride) * self.stride
        places = torch.arange(total, device=x.device)
        if self.replicate:
            last = x.new_full((1,), steps - 1, dtype=torch.long) if lengths is None else (lengths - 1).clamp(min=0)
            index = torch.minimum(places[None], last[:, None]).expand(x.shape[0], -1)
            return x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))
        x = F.pad(x, (0, total - steps))
        return x if lengths is None else torch.where((places < lengths[:, None])[:, None], x, 0)


class OmniCodecConvTranspose1d(CacheUser):
    """A transposed convolution whose outputs depend on the past alone: [B, C, T] → [B, O, T · stride].

    The kernel has 2 · stride taps. The last `stride` steps, which would need the next input, are cut off.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1, bias: bool = True):
        super().__init__()
        convtr = nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride, groups=groups, bias=bias)
        self.convtr = nn.ModuleDict({"convtr": convtr})
        self.float32 = groups > 1  # a depthwise one takes little time

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        convtr: Any = self.convtr["convtr"]
        dtype = torch.float32 if self.float32 else convtr.weight.dtype
        x = x.to(dtype)
        stride, steps = convtr.stride[0], x.shape[-1]
        x = torch.cat([self.past(x, 1, cache), x], dim=-1)
        bias = None if convtr.bias is None else convtr.bias.to(dtype)
        y = F.conv_transpose1d(x, convtr.weight.to(dtype), bias, stride, groups=convtr.groups)
        return y[..., stride : stride * (steps + 1)]


# -- SEANet


class OmniCodecResidualBlock(nn.Module):
    """x + conv(ELU(dilated conv(ELU(x))))."""

    def __init__(self, config: OmniCodecConfig, channels: int, dilation: int):
        super().__init__()
        inner = channels // config.compress
        dilated = OmniCodecConv1d(channels, inner, config.residual_kernel_size, dilation=dilation)
        self.block = nn.ModuleList([nn.ELU(), dilated, nn.ELU(), OmniCodecConv1d(inner, channels, 1)])

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return x + run(self.block, x, cache)


def residual_blocks(config: OmniCodecConfig, channels: int) -> list[nn.Module]:
    """Makes the residual blocks of a stage, with growing dilation."""
    dilations = [config.dilation_growth_rate**i for i in range(config.num_residual_layers)]
    return [OmniCodecResidualBlock(config, channels, dilation) for dilation in dilations]


def run(layers: nn.ModuleList, x: Tensor, cache: Cache | None) -> Tensor:
    """Applies layers one after the other."""
    for layer in layers:
        x = layer(x) if isinstance(layer, nn.ELU) else layer(x, cache)
    return x


class OmniCodecEncoder(nn.Module):
    """SEANet's encoder: audio [B, 1, T] → [B, D, ceil(T / hop)]."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        channels = config.num_filters
        layers: list[nn.Module] = [OmniCodecConv1d(1, channels, config.kernel_size, float32=True)]
        for ratio in reversed(config.upsampling_ratios):
            layers += [*residual_blocks(config, channels), nn.ELU()]
            layers.append(OmniCodecConv1d(channels, 2 * channels, 2 * ratio, stride=ratio))
            channels *= 2
        layers += [nn.ELU(), OmniCodecConv1d(channels, config.hidden_size, config.last_kernel_size)]
        self.model = nn.ModuleList(layers)

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the latent, and the number of its valid steps if the number of valid samples is given."""
        for layer in self.model:
            if isinstance(layer, OmniCodecConv1d) and layer.stride > 1:
                x = layer(x, None, lengths)
                lengths = None if lengths is None else ceil_div(lengths, layer.stride)
            else:
                x = layer(x)
        return x, lengths


class OmniCodecDecoder(nn.Module):
    """SEANet's decoder: [B, D, M] → audio [B, 1, M · hop], float32, not bounded to ±1."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        channels = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers: list[nn.Module] = [OmniCodecConv1d(config.hidden_size, channels, config.kernel_size)]
        for ratio in config.upsampling_ratios:
            layers += [nn.ELU(), OmniCodecConvTranspose1d(channels, channels // 2, ratio)]
            channels //= 2
            layers += residual_blocks(config, channels)
        layers += [nn.ELU(), OmniCodecConv1d(channels, 1, config.last_kernel_size, float32=True)]
        self.model = nn.ModuleList(layers)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return run(self.model, x, cache)


# -- Transformer


class OmniCodecAttention(CacheUser):
    """Causal attention of each step to the last `sliding_window` steps."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.num_heads, self.window = config.num_attention_heads, config.sliding_window
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.out_proj = OmniCodecLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None) -> Tensor:
        """Attends. `cos` and `sin` [B, 1, T, C / 2] rotate the steps, which see what `visible` [B, 1, T, L] says."""
        batch, steps, width = x.shape
        packed = F.linear(x.to(self.in_proj_weight.dtype), self.in_proj_weight)
        q, k, v = packed.view(batch, steps, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # the time of keys and values is their last axis, as it is in the cache
            keys_values = torch.stack([k, v], dim=1).transpose(-1, -2)
            joined = torch.cat([self.past(keys_values, self.window, cache), keys_values], dim=-1).transpose(-1, -2)
            k, v = joined[:, 0], joined[:, 1]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, steps, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs (2i, 2i + 1), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class OmniCodecLayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() * self.scale.float()


class OmniCodecTransformerLayer(nn.Module):
    """x += scale · attention(norm(x)); x += scale · feed_forward(norm(x))."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.norm1, self.norm2 = OmniCodecLayerNorm(config.hidden_size), OmniCodecLayerNorm(config.hidden_size)
        self.self_attn = OmniCodecAttention(config)
        self.linear1 = OmniCodecLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.linear2 = OmniCodecLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.layer_scale_1, self.layer_scale_2 = OmniCodecLayerScale(config), OmniCodecLayerScale(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.layer_scale_1(self.self_attn(self.norm1(x), cos, sin, visible, cache))
        return x + self.layer_scale_2(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


class OmniCodecTransformer(CacheUser):
    """A stack of layers without a final norm: [B, T, D] → [B, T, D] float32."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"layers": nn.ModuleList([OmniCodecTransformerLayer(config) for _ in range(config.num_hidden_layers)])}
        )
        self.window = config.sliding_window
        half = config.hidden_size // config.num_attention_heads // 2
        turns = [config.rope_theta ** (-i / half) / (2 * math.pi) for i in range(half)]
        self.turns = [round(turn * 2**32) for turn in turns]

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x.float()
        positions = torch.arange(x.shape[1], device=x.device)[None]
        keys = positions
        if cache is not None:  # a stream carries the number of steps that it has had
            seen = cache.get(self.cache_name)
            seen = positions.new_zeros(x.shape[0]) if seen is None else seen
            cache[self.cache_name] = seen + x.shape[1]
            before = torch.arange(-self.window, 0, device=x.device)[None]
            positions, keys = positions + seen[:, None], torch.cat([before, positions], dim=1) + seen[:, None]
        distance = positions[:, :, None] - keys[:, None, :]
        visible = (distance >= 0) & (distance < self.window) & (keys >= 0)[:, None]
        cos, sin = self._rotation(positions)
        layers: Any = self.transformer["layers"]
        for layer in layers:
            x = layer(x, cos[:, None], sin[:, None], visible[:, None], cache)
        return x

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Computes cosine and sine [B, T, C / 2] of position · rope_theta^(-i / (C / 2)).

        Angles are whole multiples of 2^-32 turns, so that they are as precise after a day as at the beginning.
        """
        steps = torch.tensor(self.turns, device=positions.device)
        turns = (positions[..., None] * steps + 2**31) % 2**32 - 2**31
        angles = turns.float() * (2 * math.pi / 2**32)
        return angles.cos(), angles.sin()


# -- Codebooks


class OmniCodecCodebook(KeptFloat32):
    """A codebook, stored as moving averages: an entry is embedding_sum / cluster_usage."""

    _initialized: Tensor
    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, size: int, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("_initialized", torch.ones(1, dtype=torch.float32))
        self.register_buffer("cluster_usage", torch.ones(size, dtype=torch.float32))
        self.register_buffer("embedding_sum", torch.zeros(size, dim, dtype=torch.float32))

    def encode(self, x: Tensor) -> Tensor:
        """Finds the entry nearest to each vector [B, N, V]: [B, N]."""
        embedding = self.embedding_sum / self.cluster_usage.clamp(min=self.epsilon)[:, None]
        return (embedding.square().sum(-1) - 2 * (x @ embedding.T)).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the entries of codes [B, N], and zeros for codes that are -1: [B, N, V]."""
        known = codes.clamp(min=0)
        entries = self.embedding_sum[known] / self.cluster_usage.clamp(min=self.epsilon)[known][..., None]
        return torch.where((codes >= 0)[..., None], entries, 0)


class OmniCodecSemanticQuantizer(nn.Module):
    """One codebook between two projections."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.project_in = OmniCodecLinear(config.hidden_size, config.semantic_codebook_dim)
        self.project_out = OmniCodecLinear(config.semantic_codebook_dim, config.hidden_size)
        size, dim = config.semantic_codebook_size, config.semantic_codebook_dim
        self._codebook = OmniCodecCodebook(size, dim, config.codebook_epsilon)

    def encode(self, x: Tensor) -> Tensor:
        """Quantizes vectors [B, N, D] to codes [B, N]."""
        return self._codebook.encode(self.project_in(x).float())

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the vectors [B, N, D] of codes [B, N]."""
        return self.project_out(self._codebook.decode(codes)).float()


class OmniCodecAcousticQuantizer(nn.Module):
    """Residual codebooks between two projections, each of which quantizes what those before it leave."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        self.input_proj = nn.Conv1d(config.hidden_size, config.codebook_dim, 1, bias=False)
        self.output_proj = nn.Conv1d(config.codebook_dim, config.hidden_size, 1, bias=False)
        layers = []
        for _ in range(config.num_acoustic_quantizers):
            codebook = OmniCodecCodebook(config.codebook_size, config.codebook_dim, config.codebook_epsilon)
            layers.append(nn.ModuleDict({"_codebook": codebook}))
        self.vq = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    @property
    def _layers(self) -> Any:
        return self.vq["layers"]

    def encode(self, x: Tensor, count: int) -> list[Tensor]:
        """Quantizes vectors [B, N, D] to the codes [B, N] of the first `count` codebooks."""
        weight = self.input_proj.weight[:, :, 0]
        x = F.linear(x.to(weight.dtype), weight).float()
        quantized, codes = torch.zeros_like(x), []
        for layer in self._layers[:count]:
            codes.append(layer["_codebook"].encode(x - quantized))
            quantized = quantized + layer["_codebook"].decode(codes[-1])
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Sums the vectors of codes [B, k, N] of the first k codebooks: [B, N, D]."""
        weight = self.output_proj.weight[:, :, 0]
        total = torch.zeros(codes.shape[0], codes.shape[2], weight.shape[1], device=codes.device)
        for layer, chosen in zip(self._layers, codes.unbind(1)):  # noqa: B905 (a prefix has fewer codes)
            total = total + layer["_codebook"].decode(chosen)
        return F.linear(total.to(weight.dtype), weight).float()


# -- Semantic features


def frame(x: Tensor, length: int, hop: int, count: Size) -> Tensor:
    """Cuts x [B, T] into `count` overlapping frames, the first of which begins at sample 0: [B, count, length]."""
    pieces = ceil_div(length, hop)
    hops = F.pad(x, (0, pieces * hop))[:, : (count + pieces - 1) * hop].reshape(x.shape[0], -1, hop)
    return torch.cat([hops[:, i : i + count] for i in range(pieces)], dim=-1)[..., :length]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Picks steps of each row: x [B, T, C], index [B, N] → [B, N, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def interpolate(x: Tensor, lengths: Tensor, size: Size, sizes: Tensor) -> Tensor:
    """Interpolates linearly along time, with samples at the centres of equal cells, each row by itself.

    Args:
        x: [B, S, C].
        lengths: Number of valid steps of each row, [B].
        size: Number of steps of the result, N.
        sizes: Number of valid steps of each row of the result, [B].

    Returns:
        [B, N, C].
    """
    lengths, sizes, places = lengths[:, None], sizes[:, None], torch.arange(size, device=x.device)[None]
    position, cell = ((2 * places + 1) * lengths - sizes).clamp(min=0), 2 * sizes
    left = position // cell
    weight = ((position % cell) / cell)[..., None]
    before, after = torch.minimum(left, lengths - 1), torch.minimum(left + 1, lengths - 1)
    return take(x, before) * (1 - weight) + take(x, after) * weight


class OmniCodecLogMel(KeptFloat32):
    """Whisper's log-mel spectrogram, 100 frames a second, of audio that is resampled to 16 kHz.

    The filters of the resampler and of the mel scale are in the checkpoint.
    """

    filters: Tensor
    resampler: Tensor | None
    RATE, WINDOW, HOP = 16_000, 400, 160
    VECTOR = 1280
    """Number of samples at 16 kHz of a feature vector, 80 ms."""
    REACH = 96
    """Number of samples, at the lower rate, that the resampler reaches to either side."""

    def __init__(self, config: OmniCodecConfig):
        super().__init__()
        divisor = math.gcd(config.sampling_rate, self.RATE)
        # A step of the resampler makes whole periods, of about 32 samples.
        periods = max(1, 32 * divisor // self.RATE)
        self.source, self.target = periods * config.sampling_rate // divisor, periods * self.RATE // divisor
        self.reach = math.ceil(self.REACH * self.source / min(self.source, self.target))
        taps = 2 * self.reach + self.source
        resampled = self.source != self.target
        self.register_buffer("resampler", torch.zeros(taps, self.target, dtype=torch.float32) if resampled else None)
        self.register_buffer("filters", torch.zeros(self.WINDOW // 2 + 1, config.num_mel_bins, dtype=torch.float32))

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the log-mel of each row as of a clip of its own.

        Args:
            audio: [B, T]; T is 25 ms or more.
            lengths: Number of valid samples of each row, [B].

        Returns:
            The log-mel [B, M, bins], and the number of valid frames of each row [B].
        """
        return self._spectrogram(*self._resample(audio.float(), lengths))

    def of_windows(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the log-mel of windows, each filled up with silence to whole feature vectors, of which it has one or
        more. Arguments and result are those of `forward`; T is a whole number of feature vectors."""
        low, _ = self._resample(audio.float(), lengths)
        vectors = ceil_div(lengths * self.target, self.source * self.VECTOR).clamp(min=1)
        return self._spectrogram(low, vectors * self.VECTOR)

    def _spectrogram(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the log-mel of audio at 16 kHz; see `forward`."""
        edge = self.WINDOW // 2
        index = (torch.arange(audio.shape[1] + 2 * edge, device=audio.device) - edge).abs()[None]
        last = (lengths - 1)[:, None]
        mirrored = (last - (last - index).abs()).clamp(min=0)
        count, counts = audio.shape[1] // self.HOP, lengths // self.HOP
        frames = frame(audio.gather(1, mirrored), self.WINDOW, self.HOP, count)

        places = torch.arange(self.WINDOW, device=audio.device)
        turns = places[:, None] * places[: edge + 1] % self.WINDOW
        angles = turns.float() * (2 * math.pi / self.WINDOW)
        frames = frames * (0.5 - 0.5 * angles[:, 1].cos())  # under the Hann window
        power = (frames @ angles.cos()).square() + (frames @ angles.sin()).square()
        mel = (power @ self.filters).clamp(min=1e-10).log10()

        valid = (torch.arange(count, device=audio.device) < counts[:, None])[..., None]
        loudest = torch.where(valid, mel, -10.0).amax((1, 2), keepdim=True)
        return (torch.maximum(mel, loudest - 8) + 4) / 4, counts

    def _resample(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Resamples as soxr does, which rounds the number of samples to the nearest; one that it lacks is zero."""
        samples = audio.shape[1]
        audio = torch.where(torch.arange(samples, device=audio.device) < lengths[:, None], audio, 0)
        if self.resampler is None:
            return audio, lengths
        taps, count = self.resampler.shape[0], samples // self.source + 1
        frames = frame(F.pad(audio, (self.reach, 0)), taps, self.source, count)
        size = ceil_div(samples * self.target, self.source)
        resampled = (frames @ self.resampler).flatten(1)[:, :size]
        given = (2 * lengths * self.target + self.source) // (2 * self.source)
        places = torch.arange(size, device=audio.device)
        return torch.where(places < given[:, None], resampled, 0), ceil_div(lengths * self.target, self.source)


def stack_frames(mel: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Puts eight neighbouring log-mel frames side by side; the last valid frame of a row is repeated.

    Returns:
        Features [B, ceil(M / 8), 1024], and the number of valid vectors of each row [B].
    """
    count = ceil_div(mel.shape[1], 8)
    index = torch.minimum(torch.arange(8 * count, device=mel.device)[None], (counts - 1)[:, None])
    return take(mel, index).reshape(mel.shape[0], count, -1), ceil_div(counts, 8)


# -- The model


def count_valid(name: str, mask: Tensor | None, x: Tensor, axis: int) -> Tensor:
    """Counts the valid steps of each row of x along an axis: those that a mask [B, T] or [B, 1, T] says, or all.

    Raises ValueError, which calls the mask by its name, if it is another batch's, if padding comes before valid steps,
    or if a row has none. Values are looked at where there are some.
    """
    batch, steps = x.shape[0], x.shape[axis]
    if mask is None:
        return torch.full((batch,), steps, device=x.device)
    rows = mask[:, 0] if mask.ndim == 3 else mask
    if rows.shape != (batch, steps):
        raise ValueError(f"{name} of shape {list(mask.shape)}: must be [{batch}, {steps}]")
    lengths = (rows != 0).sum(-1)
    if has_values(rows):
        if not torch.equal(rows != 0, torch.arange(steps, device=rows.device) < lengths[:, None]):
            raise ValueError(f"{name}: must be 1 for valid steps and then 0; padding is on the right")
        if not lengths.all():
            raise ValueError(f"{name}: must have a valid step in every row")
    return lengths


class OmniCodecModel(PreTrainedModel):
    """The codec. `encode` makes codes of audio, `decode` audio of codes, and calling it both.

    A stream is decoded frame by frame: the `audio_values` of all calls, one after the other, are those of one call.

    Examples:
        >>> from transformers import AutoFeatureExtractor, AutoModel
        >>> model = AutoModel.from_pretrained("models/torch", trust_remote_code=True)
        >>> extract = AutoFeatureExtractor.from_pretrained("models/torch", trust_remote_code=True)
        >>> inputs = extract([clip], sampling_rate=24_000, return_tensors="pt")
        >>> codes = model.encode(**inputs, num_quantizers=4).audio_codes  # [B, 4, N]
        >>> audio = model.decode(codes).audio_values  # [B, 1, N · frame_size]
        >>> cache = model.empty_decoder_cache(batch_size=1)
        >>> for frame in codes.split(1, dim=2):
        ...     audio, cache = model.decode(frame, decoder_cache=cache, return_dict=False)  # [B, 1, frame_size]
    """

    config: OmniCodecConfig
    config_class = OmniCodecConfig
    base_model_prefix = "omnicodec"
    main_input_name = "input_values"
    input_modalities = "audio"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ("_codebook", "log_mel")  # type: ignore[assignment]
    # The authors' checkpoints hold the frozen encoder, and a layer that is never used.
    _keys_to_ignore_on_load_unexpected = (  # type: ignore[assignment]
        r"^qwen_encoder\.",
        r"^transform\.",
        r"^frozen_encoder\.",
    )

    def __init__(self, config: OmniCodecConfig):
        super().__init__(config)
        width = config.hidden_size
        self.encoder, self.encoder_transformer = OmniCodecEncoder(config), OmniCodecTransformer(config)
        self.downsample = nn.ModuleDict(
            {"conv": OmniCodecConv1d(width, width, 4, stride=2, bias=False, replicate=True)}
        )
        self.acoustic_quantizer = OmniCodecAcousticQuantizer(config)
        self.upsample = nn.ModuleDict({"convtr": OmniCodecConvTranspose1d(width, width, 2, groups=width, bias=False)})
        self.decoder_transformer, self.decoder = OmniCodecTransformer(config), OmniCodecDecoder(config)
        if config.num_semantic_quantizers:
            self.log_mel = OmniCodecLogMel(config)
            self.proj_gt_se_emb = OmniCodecLinear(config.semantic_feature_dim, width)
            self.semantic_encoder = OmniCodecTransformer(config)
            self.semantic_quantizer = OmniCodecSemanticQuantizer(config)
            self.proj_se_q_ac_q = OmniCodecLinear(width, width)
            if config.use_adapter_1:
                self.proj_se_q_ac_emb = OmniCodecLinear(width, width)
            # Only training uses these; they are here so that nothing of a checkpoint is lost.
            self.semantic_decoder = OmniCodecTransformer(config)
            self.proj_se_q_gt = OmniCodecLinear(width, config.semantic_feature_dim)
            if config.wavlm_dim is not None:
                self.proj_wavlm = OmniCodecLinear(width, config.wavlm_dim)
        self.frozen_encoder: nn.Module | None = None
        """Encoder of transformers that computes the semantic features, to be set where it does not come with the model
        and they are not given: for `semantic_source` "qwen3_aut" a Qwen3OmniMoeAudioEncoder, for "whisper" a
        WhisperEncoder."""
        if config.encoder_config is not None:
            self.frozen_encoder = WhisperEncoder(WhisperConfig(**config.encoder_config))
        for name, module in self.named_modules():
            if isinstance(module, CacheUser):
                module.cache_name = name
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OmniCodecAttention):
            nn.init.normal_(module.in_proj_weight, std=0.02)
        elif isinstance(module, OmniCodecLayerScale):
            nn.init.constant_(module.scale, self.config.layer_scale_initial_scale)
        elif isinstance(module, OmniCodecCodebook):
            nn.init.ones_(module._initialized)
            nn.init.ones_(module.cluster_usage)
            nn.init.zeros_(module.embedding_sum)

    def _require_one_device(self) -> None:
        """Raises ValueError if `device_map` has spread the model. Weights would be missing, as a convolution and a
        codebook use those of a part that is not called, and accelerate brings weights when a part is called."""
        devices = sorted({str(device) for device in getattr(self, "hf_device_map", {}).values()})
        if len(devices) > 1:
            raise ValueError(f"device_map: the model is on {', '.join(devices)}; it must be on one, as by 'cuda'")

    # -- Lengths

    def get_encoded_length(self, input_length: Tensor) -> Tensor:
        """Counts the frames of clips: ceil(input_length / frame_size)."""
        return ceil_div(input_length, self.config.frame_size)

    def get_audio_codes_mask(self, padding_mask: Tensor, padding_side: str = "right") -> Tensor:
        """Marks the valid frames of each row, [B, N], given the mask [B, T] of valid samples."""
        lengths = self.get_encoded_length((padding_mask != 0).sum(-1))
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        return mask if padding_side == "right" else mask.flip(-1)

    # -- Encode

    @can_return_tuple
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        semantic_features: Tensor | None = None,
        semantic_features_mask: Tensor | None = None,
    ) -> OmniCodecEncoderOutput:
        """Encodes audio into codes. A row's codes depend on its own samples alone.

        Args:
            input_values: Audio [B, 1, T] at `config.sampling_rate`.
            padding_mask: 1 for valid samples and 0 for padding, which is on the right: [B, T] or [B, 1, T].
            num_quantizers: Number of codebooks, the semantic one included; None: all.
            semantic_features: [B, S, F], for models that do not compute them: 12.5 or 13 vectors a second.
            semantic_features_mask: 1 for valid vectors and 0 for padding, which is on the right: [B, S].

        Returns:
            `audio_codes` [B, K, N]; with `return_dict=False` a tuple.

        Raises:
            ValueError: If the shape or `num_quantizers` is none that the model takes, or features are missing or do not
                fit the length of the clip.
        """
        codes = self._encode(input_values, padding_mask, num_quantizers, semantic_features, semantic_features_mask)
        return OmniCodecEncoderOutput(audio_codes=codes)

    @without_autocast
    def _encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None,
        num_quantizers: int | None,
        semantic_features: Tensor | None,
        semantic_features_mask: Tensor | None,
    ) -> Tensor:
        """Encodes audio [B, 1, T] into codes [B, K, N]; see `encode`."""
        self._require_one_device()
        if input_values.ndim != 3 or input_values.shape[1] != 1 or 0 in input_values.shape:
            raise ValueError(
                f"input_values of shape {list(input_values.shape)}: must be [batch, 1, samples], mono and not empty"
            )
        if not input_values.is_floating_point():
            raise ValueError(f"input_values of {input_values.dtype}: must be floating-point numbers, full scale ±1")
        if has_values(input_values) and not (peak := float(input_values.detach().abs().max())) <= LOUDEST:
            raise ValueError(f"input_values reach {peak:g}: must be finite, and of full scale ±1")
        if semantic_features is not None and not self.config.num_semantic_quantizers:
            raise ValueError("semantic_features: this model has no semantic branch, and takes none")
        count = self.config.num_quantizers if num_quantizers is None else num_quantizers
        if not 1 <= count <= self.config.num_quantizers:
            raise ValueError(f"num_quantizers = {count}: must be between 1 and {self.config.num_quantizers}")
        lengths = count_valid("padding_mask", padding_mask, input_values, 2)
        x, valid = self.encoder(input_values, None if padding_mask is None else lengths)
        x = self.encoder_transformer(x.transpose(1, 2))
        latent = self.downsample["conv"](x.transpose(1, 2), None, valid).transpose(1, 2).float()
        frames = self.get_encoded_length(lengths)
        codes, semantic = [], None
        if self.config.num_semantic_quantizers:
            features, steps = self._semantic_features(input_values, lengths, semantic_features, semantic_features_mask)
            hidden = self.semantic_encoder(self.proj_gt_se_emb(features))
            hidden = interpolate(hidden, steps, latent.shape[1], frames)
            semantic = self.semantic_quantizer.encode(hidden)
            codes.append(semantic)
            if self.config.use_adapter_1:
                latent = latent - self.proj_se_q_ac_emb(self.semantic_quantizer.decode(semantic)).float()
        codes += self.acoustic_quantizer.encode(latent, count - len(codes))
        audio_codes = torch.stack(codes, dim=1)
        if padding_mask is not None:
            valid_frames = torch.arange(latent.shape[1], device=frames.device) < frames[:, None]
            audio_codes = torch.where(valid_frames[:, None], audio_codes, 0)
        return audio_codes

    def _semantic_features(
        self, audio: Tensor, lengths: Tensor, given: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns features [B, S, F], and the number of valid vectors of each row [B]."""
        if given is not None:
            width = self.config.semantic_feature_dim
            if given.ndim != 3 or given.shape[0] != audio.shape[0] or given.shape[2] != width or 0 in given.shape:
                raise ValueError(
                    f"semantic_features of shape {list(given.shape)}: must be [{audio.shape[0]}, vectors, {width}]"
                )
            steps = count_valid("semantic_features_mask", mask, given, 1)
            valid = torch.arange(given.shape[1], device=given.device) < steps[:, None]
            features = torch.where(valid[..., None], given, 0)
            if has_values(features):
                if not features.isfinite().all():
                    raise ValueError("semantic_features hold values that are NaN or infinite")
                self._check_vectors(steps, lengths)
            return features, steps
        source = self.config.semantic_source
        if source != "log_mel" and self.frozen_encoder is None:
            raise ValueError(
                f"this model takes semantic features ({source}): give semantic_features [batch, vectors, "
                f"{self.config.semantic_feature_dim}], or set model.frozen_encoder to the encoder that computes them"
            )
        if isinstance(self.frozen_encoder, WhisperEncoder):
            return self._encode_windows(audio[:, 0], lengths)
        shortest = int(lengths.min()) if has_values(lengths) else audio.shape[2]
        if shortest * OmniCodecLogMel.RATE < OmniCodecLogMel.WINDOW * self.config.sampling_rate:
            raise ValueError(f"a clip of {shortest} samples: too short for semantic features, which need 25 ms or more")
        mel, counts = self.log_mel(audio[:, 0], lengths)
        return stack_frames(mel, counts) if source == "log_mel" else self._encode_log_mel(mel, counts)

    def _check_vectors(self, steps: Tensor, lengths: Tensor) -> None:
        """Raises ValueError if rows [B] have more or fewer feature vectors than clips of so many samples."""
        seconds = lengths / self.config.sampling_rate
        wrong = (steps / VECTOR_RATE - seconds).abs() > 0.1 * seconds + 0.2
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"semantic_features: {int(steps[row])} vectors for {float(seconds[row]):.2f} s in row {row}: another "
                "clip's? A row that was filled up needs semantic_features_mask"
            )

    def _encode_log_mel(self, mel: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features of log-mels by transformers' encoder of Qwen3-Omni, each row as a clip of its own."""
        encoder: Any = self.frozen_encoder
        rows = []
        for row, count in zip(mel, counts.tolist(), strict=True):
            output = encoder(row[:count].T.to(encoder.dtype), feature_lens=counts.new_tensor([count]))
            rows.append(output.last_hidden_state.float())
        lengths = counts.new_tensor([len(row) for row in rows])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths

    def _encode_windows(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features by transformers' encoder of Whisper. Each window of each row is a clip of its own."""
        size = self.config.encoder_window_seconds * self.config.sampling_rate
        count = ceil_div(audio.shape[1], size)
        windows = F.pad(audio, (0, count * size - audio.shape[1])).reshape(-1, size)
        valid = (lengths[:, None] - size * torch.arange(count, device=audio.device)).clamp(0, size).flatten()
        features = self._whisper(*self.log_mel.of_windows(windows, valid))
        vector = self.config.sampling_rate * OmniCodecLogMel.VECTOR
        return features.reshape(audio.shape[0], -1, features.shape[2]), ceil_div(lengths * OmniCodecLogMel.RATE, vector)

    def _whisper(self, mel: Tensor, counts: Tensor) -> Tensor:
        """Encodes the log-mels of windows, [R, M, bins], into features [R, M / 8, F]: the means of four tokens.

        Of each row, the first `counts` [R] frames are valid, a multiple of 8. transformers' own forward takes windows
        of 30 s alone.
        """
        encoder: Any = self.frozen_encoder
        frames = torch.arange(mel.shape[1], device=mel.device)
        mel = torch.where((frames < counts[:, None])[..., None], mel, 0)
        x = F.gelu(encoder.conv1(mel.transpose(1, 2).to(encoder.dtype)))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        x = x + encoder.embed_positions.weight[: x.shape[1]]
        hidden = frames[: x.shape[1]] >= counts[:, None] // 2
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)
        for layer in encoder.layers:
            x = layer(x, mask[:, None, None])
        return encoder.layer_norm(x).float().unflatten(1, (-1, 4)).mean(2)

    # -- Decode

    @can_return_tuple
    def decode(
        self, audio_codes: Tensor, padding_mask: Tensor | None = None, decoder_cache: Cache | None = None
    ) -> OmniCodecDecoderOutput:
        """Decodes codes into audio.

        Args:
            audio_codes: Codes [B, k, N] of the first k codebooks. Acoustic codes of -1 count as left out.
            padding_mask: Mask [B, T] of the audio that was encoded; the result is cut to its length.
            decoder_cache: What the call before returned, if these are the next frames of a stream;
                `empty_decoder_cache` gives that of a stream's beginning. It is not changed.

        Returns:
            `audio_values` [B, 1, T], and `decoder_cache` if one was given; with `return_dict=False` a tuple.

        Raises:
            ValueError: If the shape of the codes is none that the model can have made.
        """
        cache = None if decoder_cache is None else dict(decoder_cache)
        audio = self._decode(audio_codes, cache)
        if padding_mask is not None:
            audio = audio[..., : padding_mask.shape[-1]]
        return OmniCodecDecoderOutput(audio_values=audio, decoder_cache=cache)

    @without_autocast
    def _decode(self, codes: Tensor, cache: Cache | None) -> Tensor:
        """Decodes codes [B, k, N] into audio [B, 1, N · frame_size], and brings the cache of a stream up to date."""
        self._require_one_device()
        self._check_codes(codes, cache)
        latent = self._dequantize(codes.long()).transpose(1, 2)
        hidden = self.decoder_transformer(self.upsample["convtr"](latent, cache).transpose(1, 2), cache)
        return self.decoder(hidden.transpose(1, 2), cache)

    def _check_codes(self, codes: Tensor, cache: Cache | None) -> None:
        """Raises ValueError for codes that the model cannot have made. Values are looked at where there are some."""
        most = self.config.num_quantizers
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= most or 0 in codes.shape:
            raise ValueError(f"codes of shape {list(codes.shape)}: must be [batch, 1 to {most}, frames]")
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes of {codes.dtype}: must be integers")
        for past in (cache or {}).values():
            if past.shape[0] != codes.shape[0]:
                raise ValueError(f"{codes.shape[0]} rows of codes, and a cache of {past.shape[0]}: must be as many")
        if not has_values(codes):
            return
        semantic = torch.arange(codes.shape[1], device=codes.device) < self.config.num_semantic_quantizers
        first = torch.where(semantic, 0, -1)
        last = torch.where(semantic, self.config.semantic_codebook_size, self.config.codebook_size) - 1
        wrong = (codes.long() < first[:, None]) | (codes.long() > last[:, None])
        if wrong.any():
            row, k, step = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"code {int(codes[row, k, step])} of codebook {k}: must be between {int(first[k])} and {int(last[k])}"
            )

    def _dequantize(self, codes: Tensor) -> Tensor:
        """Sums the vectors of codes [B, k, N]: [B, N, D]."""
        if not self.config.num_semantic_quantizers:
            return self.acoustic_quantizer.decode(codes)
        semantic = self.semantic_quantizer.decode(codes[:, 0])
        return self.acoustic_quantizer.decode(codes[:, 1:]) + self.proj_se_q_ac_q(semantic).float()

    @torch.no_grad()
    def empty_decoder_cache(self, batch_size: int = 1) -> Cache:
        """Makes the cache with which a stream begins."""
        cache: Cache = {}
        self._decode(torch.zeros(batch_size, 1, 1, dtype=torch.long, device=self.device), cache)
        return {name: torch.zeros_like(tensor) for name, tensor in cache.items()}

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        semantic_features: Tensor | None = None,
        semantic_features_mask: Tensor | None = None,
        audio_codes: Tensor | None = None,
    ) -> OmniCodecOutput:
        """Encodes audio and decodes the codes, or those that are given; see `encode` and `decode`.

        Returns:
            `audio_codes` [B, K, N] and `audio_values` [B, 1, T]; with `return_dict=False` a tuple.
        """
        if audio_codes is None:
            audio_codes = self._encode(
                input_values, padding_mask, num_quantizers, semantic_features, semantic_features_mask
            )
        audio = self._decode(audio_codes, None)[..., : input_values.shape[-1]]
        return OmniCodecOutput(audio_codes=audio_codes, audio_values=audio)


__all__ = ["OmniCodecModel"]
