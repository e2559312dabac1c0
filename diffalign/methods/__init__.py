"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

from typing import Any

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
    "inpo": "diffalign.methods.inpo:InPO",
    "smpo": "diffalign.methods.smpo:SmPO",
    "inversion_dpo": "diffalign.methods.inversion_dpo:InversionDPO",
    "seppo": "diffalign.methods.seppo:SePPO",
    "spin": "diffalign.methods.spin:SPIN",
    "densedpo": "diffalign.methods.densedpo:DenseDPO",
    "rankdpo": "diffalign.methods.rankdpo:RankDPO",
    "kto": "diffalign.methods.kto:KTO",
    "tkto": "diffalign.methods.tkto:TKTO",
    "mapo": "diffalign.methods.mapo:MaPO",
    "capo": "diffalign.methods.capo:CaPO",
    "curriculum_dpo": "diffalign.methods.curriculum_dpo:CurriculumDPO",
    "dspo": "diffalign.methods.dspo:DSPO",
    "tdpo": "diffalign.methods.tdpo:TDPO",
    "dcpo": "diffalign.methods.dcpo:DCPO",
    "dro": "diffalign.methods.dro:DRO",
    "online_dpo": "diffalign.methods.online_dpo:OnlineDPO",
    "ppd": "diffalign.methods.ppd:PPD",
}

# keys of a run's config that a method has unless the config has its own
DEFAULTS: dict[str, dict[str, Any]] = {
    "inversion_dpo": {"posterior": "mean"},  # so that a picture is one latent, whose trajectory can be kept
    "sft": {"reference": {"name": "none"}},
    "seppo": {"reference": {"name": "pool", "every": 30, "size": 8}},
    "spin": {"reference": {"name": "sync", "every": 30}},
    "curriculum_dpo": {"selection": {"name": "curriculum"}},
    "online_dpo": {"reference": {"name": "sync", "every": 40}, "prompt_dropout": 0.0},
    "ppd": {"train": "user"},
    "mapo": {"reference": {"name": "none"}},
}
