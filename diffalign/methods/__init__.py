"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

from typing import Any

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "inpo": "diffalign.methods.inpo:InPO",
    "inversion_dpo": "diffalign.methods.inversion_dpo:InversionDPO",
    "sft": "diffalign.methods.sft:SFT",
    "smpo": "diffalign.methods.smpo:SmPO",
}

# what a run's config says if its method is this one, unless it says otherwise itself
DEFAULTS: dict[str, dict[str, Any]] = {
    "inversion_dpo": {"posterior": "mean"},  # so that a picture is one latent, whose trajectory can be kept
    "sft": {"reference": {"name": "none"}},
}
