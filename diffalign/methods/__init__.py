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
    "d3po": "diffalign.methods.d3po:D3PO",
    "prdp": "diffalign.methods.prdp:PRDP",
    "ddpo": "diffalign.methods.ddpo:DDPO",
    "dpok": "diffalign.methods.dpok:DPOK",
    "grpo": "diffalign.methods.grpo:GRPO",
    "pref_grpo": "diffalign.methods.pref_grpo:PrefGRPO",
    "nft": "diffalign.methods.nft:NFT",
    "alignprop": "diffalign.methods.alignprop:AlignProp",
    "draft": "diffalign.methods.draft:DRaFT",
    "draft_lv": "diffalign.methods.draft_lv:DRaFTLV",
    "refl": "diffalign.methods.refl:ReFL",
    "drtune": "diffalign.methods.drtune:DRTune",
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
    # a picture of the empty prompt would be judged by its prompt
    **{
        name: {"prompt_dropout": 0.0}
        for name in (
            "d3po",
            "prdp",
            "ddpo",
            "dpok",
            "grpo",
            "pref_grpo",
            "alignprop",
            "draft",
            "draft_lv",
            "refl",
            "drtune",
        )
    },
    "nft": {"reference": {"name": "ema", "decay": 0.5, "rise": 0.001}, "prompt_dropout": 0.0},
}
