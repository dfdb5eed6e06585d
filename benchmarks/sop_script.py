"""The SOP's working script, repaired just enough to run on the pinned libraries. A contender of train_throughput.py.

    python benchmarks/sop_script.py BASE DATA OUT MAX_LENGTH [--cpu]

Every choice is the SOP's: 4 bits, r=64 on attention, batches of one row, eight to a step, checkpointing, 8-bit Adam,
loss on every token, `dtype` unset. Repaired: `load_in_4bit` in `model_init_kwargs` is a TypeError on transformers 5, so
the quantisation is SFTTrainer's argument; `device_map: auto` stays out on a CPU; nothing is pushed, saved or asked of
the Hub. Prints one line of JSON: seconds inside of steps, how many steps, and the peak that torch allocated.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main() -> None:
    """Train one epoch and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("max_length", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--accumulation", type=int, default=8)
    arguments = parser.parse_args()
    trainer = make_trainer(arguments)
    clock = make_clock()
    trainer.add_callback(clock)
    trainer.train()
    print(json.dumps({"busy_s": clock.busy_s, "steps": trainer.state.global_step, "peak_gib": peak_gib()}))


def make_trainer(arguments: argparse.Namespace) -> Any:
    """The SOP's trainer."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=arguments.out,
        model_init_kwargs={} if arguments.cpu else {"device_map": "auto"},
        use_cpu=arguments.cpu,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=arguments.accumulation,
        learning_rate=2e-4,
        max_length=arguments.max_length,
        bf16=True,
        gradient_checkpointing=True,
        optim="adamw_8bit",
        report_to="none",
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
    )
    peft_config = LoraConfig(
        r=64,
        lora_alpha=128,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )
    trainer = SFTTrainer(
        model=arguments.base,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train", cache_dir=arguments.out),
        args=config,
        peft_config=peft_config,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        ),
    )
    for module in trainer.model.modules():  # on a CPU bitsandbytes repacks a weight that no gradient passes then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return trainer


def make_clock() -> Any:
    """A callback that adds up the seconds inside of steps, as scripts/train_sft.py does."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        busy_s = began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.busy_s += time.monotonic() - self.began

    return Clock()


def peak_gib() -> float:
    """What torch allocated on the GPU at its peak; 0 on a CPU, which keeps no count."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
