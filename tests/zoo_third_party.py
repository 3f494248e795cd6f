"""Tiny versions of models that others wrote, with random weights: nothing in the core knows any of them.

Sizes are small, counts of layers and heads are real. Where two sizes are equal in the usual configuration, they are
equal here. Dropout is off unless a model has no switch for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo_entry import Arguments, Entry, Model, tokens

THIRD_PARTY: dict[str, Entry] = {}
VOCABULARY = 40
IMAGE = (1, 3, 32, 32)


def third_party(make_inputs: Callable[[], Arguments], *, stochastic: bool = False) -> Callable[[Any], Any]:
    """Add a model under the name of its function."""

    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = make.__name__
        THIRD_PARTY[name] = Entry(name, make, make_inputs, (), stochastic=stochastic, third_party=True)
        return make

    return add


def ids(*shape: int, **others: Callable[[], Any]) -> Callable[[], Arguments]:
    """Token numbers by keyword, and further keywords."""
    return lambda: (
        (),
        {"input_ids": torch.randint(VOCABULARY, shape), **{name: make() for name, make in others.items()}},
    )


def pixels(*shape: int) -> Callable[[], Arguments]:
    """A picture by keyword."""
    return lambda: ((), {"pixel_values": torch.randn(*shape, dtype=torch.float64)})


def build(architecture: str, **config: Any) -> nn.Module:
    """Return a model of the transformers library by the name of its class, with random weights."""
    import transformers

    architecture_class = getattr(transformers, architecture)
    return architecture_class(architecture_class.config_class(**config))


# -- language ----------------------------------------------------------------------------------------------------------


@third_party(ids(2, 9))
def gpt2() -> nn.Module:
    """A decoder whose layers are Conv1D, with learned positions and tied embeddings."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "vocab_size": VOCABULARY}
    return build("GPT2LMHeadModel", **sizes, **dropout, use_cache=False, bos_token_id=0, eos_token_id=0)


@third_party(ids(2, 9), stochastic=True)
def bert() -> nn.Module:
    """An encoder with LayerNorm behind the residual sum, and a pooled classifier."""
    return build("BertForSequenceClassification", **_encoder())


@third_party(ids(2, 9))
def deberta() -> nn.Module:
    """An encoder whose attention also looks at relative positions, by lookups in a table."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    position = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return build("DebertaV2ForMaskedLM", **_encoder(), **dropout, **position, max_relative_positions=16)


@third_party(ids(2, 9))
def llama() -> nn.Module:
    """A decoder with rotary positions, RMSNorm, gated layers, and two query heads for each key head."""
    return build("LlamaForCausalLM", **_decoder())


@third_party(ids(2, 9))
def qwen3() -> nn.Module:
    """The same with norms of queries and keys, a head dimension of its own, and tied embeddings."""
    return build("Qwen3ForCausalLM", **_decoder(), head_dim=10, tie_word_embeddings=True)


@third_party(ids(2, 9))
def mixtral() -> nn.Module:
    """A mixture of experts, of which each token goes to two of four; grouped kernels know no double."""
    model = build("MixtralForCausalLM", **_decoder(), num_local_experts=4, num_experts_per_tok=2)
    model.set_experts_implementation("batched_mm")
    return model


@third_party(ids(2, 9))
def gpt_neox() -> nn.Module:
    """A decoder with interleaved queries, keys and values, and attention beside the feed-forward layer."""
    return build("GPTNeoXForCausalLM", **_decoder(num_key_value_heads=None), hidden_dropout=0.0, attention_dropout=0.0)


@third_party(ids(2, 9))
def mamba() -> nn.Module:
    """A state-space model."""
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3, "expand": 2}
    return build("MambaForCausalLM", **sizes, vocab_size=VOCABULARY, use_cache=False)


@third_party(ids(2, 9, decoder_input_ids=lambda: torch.randint(VOCABULARY, (2, 5))))
def t5() -> nn.Module:
    """An encoder and a decoder, with relative positions shared between layers."""
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": VOCABULARY}
    return build("T5ForConditionalGeneration", **sizes, dropout_rate=0.0, use_cache=False)


# -- speech ------------------------------------------------------------------------------------------------------------


@third_party(lambda: ((), {"input_values": torch.randn(2, 400, dtype=torch.float64)}))
def wav2vec2() -> nn.Module:
    """Strided convolutions on the wave, a convolution for positions with weight norm, an encoder."""
    convolutions = {"conv_dim": (16, 16, 20), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    off = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    dropout = dict.fromkeys((*off, "layerdrop"), 0.0) | {"apply_spec_augment": False}
    return build("Wav2Vec2ForCTC", **_encoder(), **convolutions, **positions, **dropout)


@third_party(
    lambda: (
        (),
        {
            "input_features": torch.randn(2, 8, 24, dtype=torch.float64),
            "decoder_input_ids": torch.randint(VOCABULARY, (2, 5)),
        },
    )
)
def whisper() -> nn.Module:
    """Spectrograms to text: an encoder behind convolutions, and a decoder that looks at it."""
    sizes = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "vocab_size": VOCABULARY}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 36}
    lengths = {"max_source_positions": 12, "max_target_positions": 10, "dropout": 0.0, "use_cache": False}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    return build("WhisperForConditionalGeneration", **sizes, **heads, **lengths, **special)


# -- vision ------------------------------------------------------------------------------------------------------------


@third_party(pixels(*IMAGE))
def vit() -> nn.Module:
    """A plain vision transformer."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build("ViTForImageClassification", **_encoder(), **dropout, image_size=32, patch_size=8)


@third_party(pixels(*IMAGE))
def swin() -> nn.Module:
    """A hierarchical vision transformer: shifted windows, patch merging."""
    sizes = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
    return build("SwinForImageClassification", **sizes, image_size=32, drop_path_rate=0.0)


@third_party(pixels(*IMAGE))
def convnext() -> nn.Module:
    """A modern CNN: depthwise kernels, LayerNorm, layer scale."""
    return build("ConvNextForImageClassification", hidden_sizes=[12, 16], depths=[2, 2], num_stages=2, patch_size=2)


@third_party(pixels(2, 3, 32, 32))
def mobilenet_v2() -> nn.Module:
    """Inverted bottlenecks."""
    sizes = {"depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 4, "image_size": 32}
    return build("MobileNetV2ForImageClassification", **sizes, classifier_dropout_prob=0.0)


@third_party(pixels(*IMAGE))
def resnet() -> nn.Module:
    """Residual bottlenecks."""
    return build("ResNetForImageClassification", embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2])


@third_party(pixels(*IMAGE))
def segformer() -> nn.Module:
    """Attention with a reduced sequence, a depthwise kernel between linear layers, a head that joins all stages."""
    sizes = {"hidden_sizes": [12, 16], "depths": [2, 2], "num_attention_heads": [1, 2], "sr_ratios": [4, 2]}
    stages = {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    dropout = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    return build("SegformerForSemanticSegmentation", **sizes, **stages, **dropout, decoder_hidden_size=20)


@third_party(lambda: ((), {**ids(2, 9)()[1], **pixels(2, 3, 32, 32)()[1]}))
def clip() -> nn.Module:
    """Two towers, text and pictures, which meet in a product."""
    text = _encoder() | {"max_position_embeddings": 12, "eos_token_id": VOCABULARY - 1}
    picture = {**_encoder(), "image_size": 32, "patch_size": 8, "hidden_size": 20, "num_attention_heads": 2}
    return build("CLIPModel", text_config=text, vision_config=picture, projection_dim=14)


# -- Lightning's demos -------------------------------------------------------------------------------------------------


@third_party(lambda: (tuple(torch.randint(VOCABULARY, (2, 7)) for _ in range(2)), {}), stochastic=True)
def lightning_transformer() -> nn.Module:
    """Lightning's demo: `nn.Transformer` on word numbers; inputs and targets share the embedding."""
    from lightning.pytorch.demos import Transformer

    return Transformer(VOCABULARY, ninp=24, nhead=4, nhid=40, nlayers=2)


@third_party(tokens(VOCABULARY, 2, 7), stochastic=True)
def lightning_lstm() -> nn.Module:
    """Lightning's demo: two LSTM layers, started as its training step starts them."""
    from lightning.pytorch.demos.lstm import SimpleLSTM

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.model(x, self.model.init_hidden(len(x)))

    return Model(forward, model=SimpleLSTM(VOCABULARY, ninp=16, nhid=20, nlayers=2))


def _encoder() -> dict[str, Any]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16}


def _decoder(**others: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} | others
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44, "vocab_size": VOCABULARY}
    return {**sizes, **{k: v for k, v in heads.items() if v}, "max_position_embeddings": 16, "use_cache": False}
