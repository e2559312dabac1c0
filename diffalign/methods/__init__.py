"""The table of methods: name -> class. Each is one file that says what it draws, from what reference, with what loss."""

METHODS: dict[str, str] = {
    "dpo": "diffalign.methods.dpo:DPO",
    "sft": "diffalign.methods.sft:SFT",
}
