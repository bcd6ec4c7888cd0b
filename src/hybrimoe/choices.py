"""The names that a user may choose from.

They stand apart from what they name, so that the command line can print its help and refuse a wrong
name without loading numba or torch.
"""

DEVICES = ("auto", "cpu", "cuda", "emulated")
METHOD = "hybrimoe"
"""What `quantization_config.quant_method` says in config.json, and `Config.quant_method`."""
PRESETS = (
    *("hybrimoe", "hybrimoe-paper", "ktransformers", "llamacpp", "adapmoe", "fiddler"),
    *("powerinfer", "ondemand", "cpu"),
)
"""Keys of `policy.presets.PRESETS`."""
PROFILES = ("a6000", "desktop", "laptop", "h200")
"""Keys of `policy.profiles.PROFILES`."""
SHAPES = ("gpt-oss-20b", "mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite", "qwen3-30b-a3b")
"""Keys of `policy.profiles.SHAPES`."""
