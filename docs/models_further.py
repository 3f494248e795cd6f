"""Further architectures for the page: by name of the class, with a tiny configuration and inputs."""

from __future__ import annotations

from typing import Any

from tests.zoo_entry import Entry
from tests.zoo_third_party import IMAGE, VOCABULARY, build, ids, pixels

_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "use_cache": False,
}
_ENCODER = {**_DECODER, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
del _ENCODER["use_cache"]
_VISION = {**_ENCODER, "image_size": 32, "patch_size": 8}
_DISTIL = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 16}
_OPT = {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "word_embed_proj_dim": 24}

FURTHER: dict[str, tuple[str, dict[str, Any], Any]] = {
    "albert": ("AlbertForMaskedLM", {**_ENCODER, "embedding_size": 16}, ids(2, 9)),
    "roberta": ("RobertaForMaskedLM", {**_ENCODER, "max_position_embeddings": 20}, ids(2, 9)),
    "distilbert": ("DistilBertForMaskedLM", {**_DISTIL, "vocab_size": VOCABULARY}, ids(2, 9)),
    "modernbert": ("ModernBertForMaskedLM", {**_ENCODER, "pad_token_id": 0}, ids(2, 9)),
    "opt": ("OPTForCausalLM", {**_OPT, "vocab_size": VOCABULARY, "max_position_embeddings": 16}, ids(2, 9)),
    "bloom": ("BloomForCausalLM", {"hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": VOCABULARY}, ids(2, 9)),
    "falcon": ("FalconForCausalLM", {**_DECODER, "multi_query": True}, ids(2, 9)),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 10}, ids(2, 9)),
    "phi3": ("Phi3ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "pad_token_id": 0}, ids(2, 9)),
    "mistral": ("MistralForCausalLM", {**_DECODER, "num_key_value_heads": 2}, ids(2, 9)),
    "beit": ("BeitForImageClassification", _VISION, pixels(*IMAGE)),
    "deit": ("DeiTForImageClassification", _VISION, pixels(*IMAGE)),
    "dinov2": ("Dinov2ForImageClassification", _VISION, pixels(*IMAGE)),
    "regnet": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8},
        pixels(*IMAGE),
    ),
    "poolformer": (
        "PoolFormerForImageClassification",
        {
            "hidden_sizes": [12, 16],
            "depths": [2, 2],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        pixels(*IMAGE),
    ),
}


def further() -> dict[str, Entry]:
    """Return the entries; a model is built when it is asked for."""
    return {
        name: Entry(name, lambda a=architecture, c=config: build(a, **c), inputs, (), stochastic=True, third_party=True)
        for name, (architecture, config, inputs) in FURTHER.items()
    }
