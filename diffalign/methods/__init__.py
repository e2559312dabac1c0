"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

from typing import Any

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
    "rankdpo": "diffalign.methods.rankdpo:RankDPO",
    "kto": "diffalign.methods.kto:KTO",
    "tkto": "diffalign.methods.tkto:TKTO",
    "mapo": "diffalign.methods.mapo:MaPO",
    "capo": "diffalign.methods.capo:CaPO",
    "dspo": "diffalign.methods.dspo:DSPO",
    "tdpo": "diffalign.methods.tdpo:TDPO",
    "dcpo": "diffalign.methods.dcpo:DCPO",
    "densedpo": "diffalign.methods.densedpo:DenseDPO",
}

# sections of a run's config that a method has unless the config has its own
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {"reference": {"name": "none"}},
    "mapo": {"reference": {"name": "none"}},
}
