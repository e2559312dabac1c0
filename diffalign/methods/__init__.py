"""The table of methods: name -> class. Each is one file that names its choices: samples, reference, loss."""

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
}
