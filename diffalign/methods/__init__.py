"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

from typing import Any

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
    "seppo": "diffalign.methods.seppo:SePPO",
    "spin": "diffalign.methods.spin:SPIN",
    "curriculum_dpo": "diffalign.methods.curriculum_dpo:CurriculumDPO",
    "dro": "diffalign.methods.dro:DRO",
    "online_dpo": "diffalign.methods.online_dpo:OnlineDPO",
}

# keys of a run's config that a method has unless the config has its own
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"reference": {"name": "none"}},
    "seppo": {"reference": {"name": "pool", "every": 30, "size": 8}},
    "spin": {"reference": {"name": "sync", "every": 30}},
    "curriculum_dpo": {"selection": {"name": "curriculum"}},
    "online_dpo": {"reference": {"name": "sync", "every": 40}, "prompt_dropout": 0.0},
}
