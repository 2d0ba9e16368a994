"""Training and running a causal language model on a small machine: frozen layers, streamed loading, lean activations.

    model = load_streaming(folder, dtype=torch.bfloat16, quantization="int8")     # streaming
    config._register_custom_module(custom_modules())                              # peft_layers, on a peft.LoraConfig
    model = get_peft_model(model, config)
    prepare_for_training(model, checkpointing=True)                               # activations

Everything here works on any device; the fast paths are those of x86 CPUs with VNNI or AMX.
"""
