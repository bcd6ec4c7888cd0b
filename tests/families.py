"""A tiny random model for every transformers family with decorated routed experts.

`python tests/families.py [name ...]` builds, runs and checks them, one line per family.
"""

import argparse
import copy
import functools
import importlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

DECORATED = re.compile(r"^@use_experts_implementation\b.*?^class (\w+)", re.DOTALL | re.MULTILINE)

# Passed to a config only where it has such a field, so that one table fits all families.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # nothing ends a generation early
    # Experts.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 32,
    "dense_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "enable_moe_block": True,
    "moe_hidden_size": 32,
    "moe_latent_size": 32,
    "router_hidden_size": 32,
    # Which layers have experts.
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    # Attention.
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 32,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_kpool": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "o_groups": 2,
    "o_lora_rank": 16,
    "hc_mult": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    # Linear attention and state space layers.
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
# A cache needs one attention layer to know how long the sequence is.
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = {"layer_types": ["linear_attention", "indexed_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
# The sections must add up to half of the rotated part of a head.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
# The layer in the middle runs twice in each pass, each time with a cache of its own.
LOOPED = {
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_num_passes": 2,
    "loop_gate_rank": 16,
}


@dataclass(frozen=True)
class Recipe:
    """model: class to build. sizes: config fields, over SIZES."""

    model: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


# Keyed by the folder in transformers/models, because experts classes get renamed; by the full
# name where one folder has two of them.
RECIPES = {
    "afmoe": Recipe("AfmoeForCausalLM"),
    "aria": Recipe("AriaTextForCausalLM"),
    "axk1": Recipe("AXK1ForCausalLM"),
    "axk2": Recipe("AXK2ForCausalLM"),
    "bailing_hybrid": Recipe("BailingHybridForCausalLM", LINEAR),
    "beam": Recipe("BeamForCausalLM"),
    "cohere2_moe": Recipe("Cohere2MoeForCausalLM"),
    "deepseek_ocr2": Recipe("DeepseekOcr2TextModel"),
    "deepseek_v2": Recipe("DeepseekV2ForCausalLM"),
    "deepseek_v3": Recipe("DeepseekV3ForCausalLM", DENSE_FIRST),
    "deepseek_v32": Recipe("DeepseekV32ForCausalLM"),
    "deepseek_v4": Recipe(
        "DeepseekV4ForCausalLM",
        {
            "mlp_layer_types": ["hash_moe", "moe"],
            "layer_types": list(COMPRESSED),
            "compress_rates": COMPRESSED,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.5,
        },
    ),
    "diffusion_gemma": Recipe("DiffusionGemmaEncoderTextModel", SLIDING),
    "dots1": Recipe("Dots1ForCausalLM"),
    "dots3_note": Recipe("Dots3NoteForCausalLM", {"use_sliding_window": False}),
    "ernie4_5_moe": Recipe("Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Recipe(
        "Ernie4_5_VLMoeTextModel", {"moe_intermediate_size": [32, 16], "rope_parameters": MROPE}
    ),
    "exaone_moe": Recipe("ExaoneMoeForCausalLM"),
    "flex_olmo": Recipe("FlexOlmoForCausalLM"),
    "flint": Recipe("FlintForCausalLM"),
    "gemma4": Recipe("Gemma4ForCausalLM", SLIDING | {"tie_word_embeddings": False}),
    "glm4_moe": Recipe("Glm4MoeForCausalLM", DENSE_FIRST),
    "glm4_moe_lite": Recipe("Glm4MoeLiteForCausalLM"),
    "glm4v_moe": Recipe(
        "Glm4vMoeTextModel", {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
    ),
    "glm5_next": Recipe("Glm5NextTextModel", INDEXED | {"qk_rope_head_dim": 0}),
    "glm_moe_dsa": Recipe("GlmMoeDsaForCausalLM"),
    "gpt_oss": Recipe("GptOssForCausalLM"),
    "granitemoe": Recipe("GraniteMoeForCausalLM"),
    "granitemoe_swa": Recipe("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Recipe("GraniteMoeHybridForCausalLM", LINEAR),
    "granitemoeshared": Recipe("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Recipe("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Recipe("HYV3ForCausalLM"),
    "hy_v4": Recipe("HYV4ForCausalLM"),
    "hy_v4_vl": Recipe(
        "HYV4VLTextModel", {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}}
    ),
    "inkling": Recipe("InklingForCausalLM"),
    "inkling2": Recipe("Inkling2ForCausalLM"),
    "inkling2_loop": Recipe("Inkling2LoopForCausalLM", LOOPED),
    "jamba": Recipe("JambaForCausalLM"),
    "kimi_linear": Recipe("KimiLinearForCausalLM", LINEAR),
    "kolibri1": Recipe("Kolibri1ForCausalLM"),
    "laguna": Recipe("LagunaForCausalLM"),
    "lara_mini": Recipe("LaraMiniForCausalLM", LINEAR | {"tie_word_embeddings": False}),
    "lfm2_moe": Recipe("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mellum": Recipe("MellumForCausalLM"),
    "mimo_v2_flash": Recipe("MiMoV2FlashForCausalLM", {"num_key_value_heads": 2}),
    "minimax": Recipe("MiniMaxForCausalLM"),
    "minimax_m2": Recipe("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Recipe("MiniMaxM3VLForCausalLM"),
    "mistral4": Recipe("Mistral4ForCausalLM"),
    "mistral_large4": Recipe("MistralLarge4TextModel"),
    "mixtral": Recipe("MixtralForCausalLM"),
    "muse_spark": Recipe("MuseSparkTextModel", {"output_multiplier": 1.0}),
    "nemotron_h": Recipe("NemotronHForCausalLM"),
    "olmoe": Recipe("OlmoeForCausalLM"),
    "openai_privacy_filter": Recipe("OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Recipe("PhimoeForCausalLM"),
    "qwen2_moe": Recipe("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Recipe("Qwen3_5MoeForCausalLM", LINEAR),
    "qwen3_moe": Recipe("Qwen3MoeForCausalLM"),
    "qwen3_next": Recipe("Qwen3NextForCausalLM", LINEAR),
    "qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts": Recipe("Qwen3OmniMoeThinkerTextModel"),
    "qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts": Recipe(
        "Qwen3OmniMoeTalkerModel", {"shared_expert_intermediate_size": 32}
    ),
    "qwen3_vl_moe": Recipe("Qwen3VLMoeTextModel"),
    "qwen4_exp": Recipe("Qwen4ExpForCausalLM", INDEXED),
    "solar_open": Recipe("SolarOpenForCausalLM"),
    "unlimited_ocr": Recipe("UnlimitedOcrTextModel"),
    "zaya": Recipe("ZayaForCausalLM", {"num_experts_per_tok": 1, "tie_word_embeddings": False}),
}
# Families that cannot be built tiny on the CPU, each with the reason.
SKIPPED: dict[str, str] = {
    "glm_moe_dsa.GlmMoeDsaNaiveMoe": "its indexer keeps keys from call to call in this release of "
    "transformers, so the unwrapped model fails, too",
}
# Load balancing terms of routers: small next to the scores, or every token takes the same experts.
BALANCE = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def decorated() -> list[str]:
    """Every decorated experts class of the installed transformers, as folder.Class."""
    return list(_scan())


def missing() -> list[str]:
    """Decorated classes that have neither a recipe nor a reason to be skipped."""
    return [name for name in decorated() if name not in SKIPPED and _find(name) is None]


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny model with the experts class `name`, on the CPU, in eval mode, all weights random."""
    folder, experts_class = name.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model_class = getattr(module, _recipe(name).model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(
            _config(model_class.config_class, _recipe(name).sizes),
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=dtype,
        )
        _upcast(model, dtype)
        _randomize(model)
    assert any(type(m).__name__ == experts_class for m in experts(model)), f"{name} is not used"
    return model.eval().requires_grad_(False)


def experts(model: nn.Module) -> list[nn.Module]:
    """The routed experts modules of a model, first layer first."""
    names = {name.split(".")[1] for name in decorated()}
    return [module for module in model.modules() if type(module).__name__ in names]


def inputs(
    name: str, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """Keyword arguments for `model(**inputs)`: random tokens, none of them padding."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=random)
    if hasattr(model, "codec_embedding"):  # the Qwen3-Omni talker takes embeddings only
        return {"inputs_embeds": model.codec_embedding(ids)}
    if name.startswith("ernie4_5_vl_moe."):  # its vision experts see only the tokens marked 1
        vision = (torch.arange(length) % 3 == 0).int()
        return {"input_ids": ids, "moe_mm_token_type_ids": vision.expand(batch, -1)}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, or the last hidden state of a model that has no head."""
    output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


def generates(name: str) -> bool:
    """Whether `model.generate(**inputs, max_new_tokens=64, do_sample=False)` works."""
    return _recipe(name).model.endswith("ForCausalLM")


@functools.cache
def _scan() -> tuple[str, ...]:
    found = []
    for path in sorted(Path(transformers.__path__[0], "models").glob("*/modeling_*.py")):
        classes = DECORATED.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.parent.name}.{name}" for name in classes]
    return tuple(found)


def _find(name: str) -> Recipe | None:
    return RECIPES.get(name) or RECIPES.get(name.split(".")[0])


def _recipe(name: str) -> Recipe:
    recipe = _find(name)
    if recipe is None:
        raise ValueError(f"name must be a family with a recipe, got {name}")
    return recipe


def _config(config_class: type[PreTrainedConfig], sizes: Mapping[str, Any]) -> PreTrainedConfig:
    known = {item.name for item in fields(config_class)}
    common = {key: value for key, value in SIZES.items() if key in known}
    return config_class(**copy.deepcopy(common | dict(sizes)))  # a config may edit its lists


def _upcast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep in float32 what from_pretrained would keep."""
    kept = model._get_dtype_plan(dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(part in name for part in kept):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Make every weight matter: many start at zero, one or a scale that hides the experts."""
    saved = model.state_dict(keep_vars=True)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in saved.items()}.values():
        if name.endswith("tid2eid"):  # DeepSeek-V4 looks the experts of a token up
            tensor.copy_(torch.rand(len(tensor), SIZES["num_experts"]).argsort()[:, :2])
        elif name.endswith(BALANCE):
            tensor.copy_(0.02 * torch.randn(tensor.shape))
        elif not tensor.is_floating_point():
            continue
        elif tensor.dim() < 2 or "bias" in name:  # a norm may start at zero or at one
            tensor.add_(0.1 * torch.randn(tensor.shape))
        else:
            tensor.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)


def _effects(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Iterator[float]:
    """Relative change of the output when one experts module adds nothing, for each of them."""
    reference = logits(model, given)
    for module in experts(model):
        down = {k: p.clone() for k, p in module.named_parameters() if k.startswith("down_proj")}
        for key in down:
            module.get_parameter(key).zero_()
        yield ((logits(model, given) - reference).norm() / reference.norm()).item()
        for key, value in down.items():
            module.get_parameter(key).copy_(value)


def _check(name: str) -> str:
    started = time.perf_counter()
    model = build(name)
    given = inputs(name, model)
    output = logits(model, given)
    forward_s = time.perf_counter() - started
    effect = min(_effects(model, given))
    low = build(name, torch.bfloat16)
    problems = [
        what
        for what, found in {
            "not finite": not output.isfinite().all(),
            "not finite in bfloat16": not logits(low, inputs(name, low)).isfinite().all(),
            "experts do not matter": not effect > 1e-2,
            "not eager": model.config._experts_implementation != "eager",
        }.items()
        if found
    ]
    if generates(name):
        tokens = model.generate(**given, max_new_tokens=64, do_sample=False)
        problems += [] if tokens.shape == (2, 12 + 64) else ["generation stopped early"]
    seconds = time.perf_counter() - started
    facts = f"{forward_s:6.2f} s {seconds:6.2f} s {effect:6.2f} {generates(name)!s:6}"
    return f"{name:50} {facts} {', '.join(problems) or 'ok'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=decorated())
    names = [name for name in parser.parse_args().names if name not in SKIPPED]
    torch.set_num_threads(1)
    print(f"{'family':50} {'forward':>8} {'all':>8} {'effect':>6} {'generates'}")
    lines = []
    for name in names:
        lines.append(_check(name))
        print(lines[-1], flush=True)
    good = sum(line.endswith(" ok") for line in lines)
    print(f"{good} of {len(lines)} ok, {len(SKIPPED)} skipped, missing: {missing() or 'none'}")
    return 0 if good == len(lines) and not missing() else 1


if __name__ == "__main__":
    sys.exit(main())
