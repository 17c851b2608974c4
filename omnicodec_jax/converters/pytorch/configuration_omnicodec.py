"""The configuration of OmniCodec for transformers. Options that Mimi has, too, have the names that they have there."""

import math
from typing import Any

from transformers import PreTrainedConfig


class OmniCodecConfig(PreTrainedConfig):
    """Configuration of an `OmniCodecModel`. The defaults are those of the released model at 12.5 frames a second."""

    model_type = "omnicodec"

    def __init__(
        self,
        sampling_rate: int = 24_000,
        hidden_size: int = 512,
        num_filters: int = 64,
        num_residual_layers: int = 4,
        upsampling_ratios: tuple[int, ...] = (8, 6, 5, 4),
        kernel_size: int = 7,
        residual_kernel_size: int = 3,
        last_kernel_size: int = 3,
        dilation_growth_rate: int = 2,
        compress: int = 2,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        intermediate_size: int = 2048,
        sliding_window: int = 250,
        rope_theta: float = 10_000.0,
        layer_scale_initial_scale: float = 0.01,
        num_semantic_quantizers: int = 1,
        semantic_source: str | None = "stored",
        semantic_feature_dim: int = 2048,
        num_mel_bins: int = 128,
        encoder_config: dict[str, Any] | None = None,
        encoder_window_seconds: int = 4,
        semantic_codebook_size: int = 2048,
        semantic_codebook_dim: int = 1024,
        num_acoustic_quantizers: int = 32,
        codebook_size: int = 2048,
        codebook_dim: int = 256,
        codebook_epsilon: float = 1e-5,
        use_adapter_1: bool = True,
        wavlm_dim: int | None = 768,
        input_peak: float | None = 0.95,
        **kwargs: Any,
    ):
        """Sets the options.

        Args:
            sampling_rate: Sample rate of the audio, Hz.
            hidden_size: Width of the latents and of the transformers, D.
            num_filters: Channels of the convolutions at the full rate. They double at every stage down.
            num_residual_layers: Number of residual blocks in a stage.
            upsampling_ratios: Strides of the decoder's stages; the encoder has them in reverse.
            kernel_size: Kernel of the first convolution.
            residual_kernel_size: Kernel of the dilated convolutions in the residual blocks.
            last_kernel_size: Kernel of the last convolution.
            dilation_growth_rate: Factor from the dilation of a residual block to that of the next one.
            compress: Residual blocks work at 1/compress of the channels.
            num_hidden_layers: Number of layers of each transformer.
            num_attention_heads: Number of heads of each layer.
            intermediate_size: Width of the feed-forward parts.
            sliding_window: A step sees itself and the `sliding_window - 1` steps before it.
            rope_theta: Longest period of the rotary embedding.
            layer_scale_initial_scale: LayerScale of untrained layers.
            num_semantic_quantizers: Number of semantic codebooks: 1, or 0 for a model without semantic branch.
            semantic_source: Where semantic features come from: "stored" (they are given), "log_mel" (the model
                computes them), or the name of a frozen encoder, "qwen3_aut" or "whisper".
            semantic_feature_dim: Width of the semantic features, F.
            num_mel_bins: Number of bins of the log-mel that the features are computed of.
            encoder_config: Options of transformers' WhisperConfig for the encoder of Whisper that comes with the model;
                None: there is none.
            encoder_window_seconds: Length of the windows that Whisper's encoder takes, each by itself.
            semantic_codebook_size: Number of entries of the semantic codebook.
            semantic_codebook_dim: Width of its entries.
            num_acoustic_quantizers: Number of acoustic codebooks.
            codebook_size: Number of entries of each acoustic codebook.
            codebook_dim: Width of their entries.
            codebook_epsilon: Smallest usage that an entry is divided by.
            use_adapter_1: Whether what the semantic code says is subtracted before the acoustic codebooks.
            wavlm_dim: Width of a head that only training uses; None: there is none.
            input_peak: What the feature extractor scales clips to; None: they stay as loud as they are.
            kwargs: Options of every model of transformers.
        """
        super().__init__(**kwargs)
        self.sampling_rate = sampling_rate
        self.hidden_size = hidden_size
        self.num_filters = num_filters
        self.num_residual_layers = num_residual_layers
        self.upsampling_ratios = list(upsampling_ratios)
        self.kernel_size = kernel_size
        self.residual_kernel_size = residual_kernel_size
        self.last_kernel_size = last_kernel_size
        self.dilation_growth_rate = dilation_growth_rate
        self.compress = compress
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.sliding_window = sliding_window
        self.rope_theta = rope_theta
        self.layer_scale_initial_scale = layer_scale_initial_scale
        self.num_semantic_quantizers = num_semantic_quantizers
        self.semantic_source = semantic_source
        self.semantic_feature_dim = semantic_feature_dim
        self.num_mel_bins = num_mel_bins
        self.encoder_config = encoder_config
        self.encoder_window_seconds = encoder_window_seconds
        self.semantic_codebook_size = semantic_codebook_size
        self.semantic_codebook_dim = semantic_codebook_dim
        self.num_acoustic_quantizers = num_acoustic_quantizers
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.codebook_epsilon = codebook_epsilon
        self.use_adapter_1 = use_adapter_1
        self.wavlm_dim = wavlm_dim
        self.input_peak = input_peak

    @property
    def num_quantizers(self) -> int:
        """Number of all codebooks, K, the semantic one included."""
        return self.num_semantic_quantizers + self.num_acoustic_quantizers

    @property
    def num_codebooks(self) -> int:
        """Number of all codebooks, under transformers' other name for it."""
        return self.num_quantizers

    @property
    def frame_size(self) -> int:
        """Number of samples in a frame."""
        return 2 * math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.frame_size


__all__ = ["OmniCodecConfig"]
