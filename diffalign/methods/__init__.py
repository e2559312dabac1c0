"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

from typing import Any

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
    "ppd": "diffalign.methods.ppd:PPD",
}

# keys of a run's config that a method has unless the config has its own
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"reference": {"name": "none"}},
    "ppd": {"train": "user"},
}
