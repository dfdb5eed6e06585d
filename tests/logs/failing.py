"""Scripts that fail as people's scripts do, one function each. `scripts/dev/make_logs.py` runs them and keeps the logs.

A function's name is its fixture's name, `-` for `_`; what it prints beside the error is meant to mislead.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

CHAT = {"messages": [{"role": "user", "content": "How many sailors?"}, {"role": "assistant", "content": "42 sailors."}]}


def base(family: str = "llama", **changes: Any) -> str:
    """A tiny model in the working folder, by family."""
    from tiny_models import make_tiny

    folder = Path(f"base-{family}-{len(changes)}")
    if not folder.exists():
        make_tiny(folder, family, **changes)
    return str(folder)


def rows(*given: Any) -> Any:
    """A dataset of these rows."""
    from datasets import Dataset

    return Dataset.from_list(list(given))


def settings(**given: Any) -> Any:
    """A config for the CPU."""
    from trl import SFTConfig

    plain = {"output_dir": "out", "use_cpu": True, "max_steps": 2, "report_to": "none", "disable_tqdm": True}
    return SFTConfig(**{**plain, **given})


def train(model: Any = None, data: Any = None, peft: Any = None, **given: Any) -> None:
    """Train as the documentation shows it."""
    from trl import SFTTrainer

    data = rows(CHAT, CHAT) if data is None else data
    SFTTrainer(model=model or base(), train_dataset=data, args=settings(**given), peft_config=peft).train()


def lora(**given: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **given})


# Arguments and values.


def old_sft_argument() -> None:
    print("FutureWarning: `max_seq_length` is deprecated, see the migration guide")
    settings(max_seq_length=2048)


def tokenizer_argument() -> None:
    from trl import SFTTrainer

    SFTTrainer(model=base(), tokenizer="x", train_dataset=rows(CHAT), args=settings())


def load_in_4bit_argument() -> None:
    train(model_init_kwargs={"load_in_4bit": True})


def bad_optimizer_name() -> None:
    train(optim="adam8")


def bad_scheduler_name() -> None:
    train(lr_scheduler_type="cosinee")


def bad_tracker_name() -> None:
    train(report_to="bogus")


def learning_rate_as_text() -> None:
    train(learning_rate="2e-4")


def evaluation_without_rows() -> None:
    train(eval_strategy="steps", eval_steps=1)


def save_and_eval_differ() -> None:
    settings(eval_strategy="epoch", save_strategy="steps", load_best_model_at_end=True)


def no_bf16_on_this_machine() -> None:
    train(use_cpu=False)


# Adapters, attention, gradients.


def adapter_targets_missing() -> None:
    train(peft=lora(target_modules=["qkv_proj_x"]))


def adapter_on_the_head() -> None:
    train(peft=lora(target_modules=["q_proj", "lm_head"]))


def quantised_without_adapter() -> None:
    from transformers import BitsAndBytesConfig

    train(model_init_kwargs={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})


def flash_attention_not_installed() -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base(), attn_implementation="flash_attention_3")


def nothing_has_a_gradient() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base()).requires_grad_(False)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()


def token_id_beyond_vocabulary() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base())
    print("Some weights of the model checkpoint were not used when initializing LlamaForCausalLM: ['x']")
    model(input_ids=torch.full((1, 4), 32000))


def two_number_formats() -> None:
    import torch

    torch.nn.Linear(4, 4)(torch.ones(2, 4, dtype=torch.bfloat16))


def shapes_do_not_fit() -> None:
    import torch

    torch.nn.Linear(8, 4)(torch.ones(2, 4))


def weights_on_meta() -> None:
    import torch

    torch.nn.Linear(8, 4, device="meta").to("cpu")


def no_cuda_in_this_torch() -> None:
    import torch

    torch.zeros(1).cuda()


def sampling_from_nan() -> None:
    import torch

    torch.multinomial(torch.full((4,), float("nan")), 1)


def training_diverges() -> None:
    """The run ends well: only its numbers say that it did not."""
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(base())
    model.model.norm.weight.data.fill_(float("nan"))
    arguments = settings(max_steps=4, logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=False)
    SFTTrainer(model=model, train_dataset=rows(CHAT, CHAT), args=arguments, callbacks=[TrainerCallback()]).train()


def no_padding_token() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base())
    tokenizer.pad_token = None
    tokenizer(["a", "a longer one"], padding=True)


# Rows.


def prefer(data: Any, model: Any = None, peft: Any = None, **given: Any) -> None:
    """Prefer answers as the documentation shows it."""
    from trl import DPOConfig, DPOTrainer

    plain = {"output_dir": "out", "use_cpu": True, "max_steps": 2, "report_to": "none", "disable_tqdm": True}
    DPOTrainer(model or base(), args=DPOConfig(**{**plain, **given}), train_dataset=data, peft_config=peft).train()


PAIR = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}


def pairs_without_a_rejected_answer() -> None:
    print("Extracting prompt from train dataset: chosen 0/2")
    prefer(rows(CHAT, CHAT))


def exo_without_smoothing() -> None:
    prefer(rows(PAIR, PAIR), loss_type=["exo_pair"])


def reference_cannot_follow_an_adapter() -> None:
    prefer(rows(PAIR, PAIR), peft=lora(), sync_ref_model=True)


def column_missing() -> None:
    train(data=rows({"instruction": "a", "output": "b"}))


def text_field_missing() -> None:
    train(data=rows({"text": "a"}), dataset_text_field="content")


def no_column_of_the_model() -> None:
    train(data=rows({"messages": "user: hello"}))


def turns_do_not_alternate() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    train(base("gemma3_text"), rows({"messages": [*twice, *CHAT["messages"]]}))


def base_without_template() -> None:
    folder = Path(base("mistral"))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    train(str(folder))


def every_row_too_long() -> None:
    long = [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "ok"}]
    train(data=rows({"messages": long}), max_length=64, assistant_only_loss=True)


def dataset_is_empty() -> None:
    train(data=rows())


def broken_json_line() -> None:
    from datasets import load_dataset

    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": "b"\n{"text": "c"}\n')
    load_dataset("json", data_files="rows.jsonl", split="train")


def columns_differ_between_files() -> None:
    from datasets import load_dataset

    Path("one.jsonl").write_text('{"text": "a"}\n')
    Path("two.jsonl").write_text('{"text": "b", "source": "c"}\n')
    load_dataset("json", data_files=["one.jsonl", "two.jsonl"], split="train")


def not_a_parquet_file() -> None:
    from datasets import load_dataset

    Path("rows.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    load_dataset("parquet", data_files="rows.parquet", split="train")


def split_is_not_there() -> None:
    from datasets import load_dataset

    Path("rows.jsonl").write_text('{"text": "a"}\n')
    load_dataset("json", data_files="rows.jsonl", split="validation")


# Model files.


def weights_cut_off() -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(base("qwen3"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    AutoModelForCausalLM.from_pretrained(folder)


def weights_are_a_pointer() -> None:
    from safetensors.torch import load_file

    Path("model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    )
    load_file("model.safetensors")


def adapter_of_another_base() -> None:
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base())
    get_peft_model(model, lora(target_modules=["q_proj"])).save_pretrained("adapter")
    wider = AutoModelForCausalLM.from_pretrained(base("llama", hidden_size=128))
    PeftModel.from_pretrained(wider, "adapter")


def adapter_is_not_there() -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    Path("nothing").mkdir(exist_ok=True)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), "nothing")


def code_in_the_repository() -> None:
    from transformers import AutoModelForCausalLM

    folder = Path("remote-code")
    folder.mkdir(exist_ok=True)
    auto = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    os.environ["HF_HUB_DISABLE_REMOTE_CODE_PROMPT"] = "1"
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=None)


def architecture_is_newer() -> None:
    from transformers import AutoModelForCausalLM

    folder = Path("newer")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma9", "architectures": ["Gemma9ForCausalLM"]}))
    AutoModelForCausalLM.from_pretrained(folder)


def tokenizer_format_is_newer() -> None:
    from tokenizers import Tokenizer

    Path("tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "Quantum", "vocab": {}}}))
    Tokenizer.from_file("tokenizer.json")


def pickle_refused() -> None:
    import torch

    torch.save({"path": Path("x")}, "pytorch_model.bin")
    torch.load("pytorch_model.bin")


# The Hub. HF_ENDPOINT is the loopback Hub of tests/servers; HF_TOKEN is alice's, and only reads.


def gated_base() -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("google/gemma-3-12b-it")


def base_not_there() -> None:
    train("acme/tiny-basis")


def wrong_token() -> None:
    from huggingface_hub import HfApi

    HfApi(token="hf_" + "Expired1" * 4).whoami()


def data_not_there() -> None:
    from datasets import load_dataset

    load_dataset("acme/no-such-rows", split="train")


def may_not_create_the_output() -> None:
    train(push_to_hub=True, hub_model_id="bob/coach")


def may_not_upload() -> None:
    from huggingface_hub import upload_file

    for step in (10, 20, 30):
        print(
            f"{{'loss': '{3 / step:.3f}', 'grad_norm': '1.2', 'learning_rate': '0.0002', 'epoch': '{step / 30:.2f}'}}"
        )
    upload_file(path_or_fileobj=b"x" * 200, path_in_repo="adapter.safetensors", repo_id="acme/coach-adapter")


def pushes_in_the_background() -> None:
    """Every push is refused, the process ends with 0, and nothing of it is in the log."""
    hub = {"push_to_hub": True, "hub_model_id": "acme/coach-adapter", "hub_strategy": "every_save", "save_steps": 1}
    train(disable_tqdm=False, **hub)


def loss_stays_where_it_was() -> None:
    train(learning_rate=1e-12, max_steps=24, logging_steps=1)


def may_not_commit() -> None:
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="acme/coach-adapter")


def no_credit_for_jobs() -> None:
    from huggingface_hub import HfApi

    HfApi(token="hf_" + "WriteAll" * 4).run_job(image="python:3.12", command=["true"], namespace="broke")


def revision_not_there() -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("acme/coach-adapter", revision="5d2f0c1e7c3b4a5968778695a4b3c2d1e0f9a8b7")


def nobody_listens() -> None:
    from huggingface_hub import HfApi

    HfApi(endpoint="http://127.0.0.1:9").model_info("acme/coach-adapter")


def hub_in_trouble() -> None:
    """The first request is answered after a repetition; a later one is not."""
    from huggingface_hub import HfApi

    print("HTTP Error 503 thrown while requesting GET https://huggingface.co/api/models/acme: Retrying in 1s.")
    print("Fetching 8 files: 100%|##########| 8/8 [00:04<00:00,  1.9it/s]")
    HfApi().model_info("acme/in-trouble")


# The machine and the script.


def disk_full_while_writing() -> None:
    print("Saving model checkpoint to out/checkpoint-500", flush=True)
    with Path("/dev/full").open("wb") as file:
        file.write(b"x" * 1_000_000)


def disk_full_while_saving() -> None:
    import torch

    torch.save({"x": torch.zeros(1_000_000)}, "/dev/full")


def out_of_host_memory() -> None:
    import torch

    torch.empty(2**50, dtype=torch.uint8)


def data_worker_killed() -> None:
    import torch

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            os.kill(os.getpid(), signal.SIGKILL)
            return index

    list(torch.utils.data.DataLoader(Rows(), num_workers=1))


def package_missing() -> None:
    print(
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Using the slow path."
    )
    import mergekit_evolve  # noqa: F401


def name_moved_between_versions() -> None:
    from trl import DataCollatorForCompletionOnlyLM  # noqa: F401


def asks_for_a_login() -> None:
    print("Add token as git credential? (Y/n) ", end="", flush=True)
    input()


def trackio_missing() -> None:
    train(report_to="trackio")


def name_misspelt() -> None:
    train(data=dataset)  # noqa: F821


def inputs_are_read_only() -> None:
    Path("/sys/kernel/uevent_seqnum").write_text("x")


def pip_finds_no_version() -> None:
    import subprocess

    subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", "trl==99.0"], check=True)


def nobody_knows_why() -> None:
    print("[INFO] reading config")
    print("ERROR: sampler disagrees with curriculum (bucket 7)")
    raise AssertionError("bucket 7 has 3 rows, curriculum says 4")


# llama.cpp's converter and library, from the cache that scripts/convert_gguf.py fills.


def llama_cpp() -> Path:
    """The folder of the pinned llama.cpp."""
    cache = Path(os.environ.get("MERGETUNE_CACHE") or Path.home() / ".cache/mergetune")
    return next(folder for folder in sorted(cache.glob("llama.cpp-*")) if (folder / "lib").is_dir())


def shell(*command: Any, **environment: str) -> None:
    """A command as a job's script runs it: its output is the log's."""
    import subprocess

    sys.stdout.flush()
    subprocess.run([str(part) for part in command], check=False, env={**os.environ, **environment})


def convert(folder: Any) -> None:
    shell(sys.executable, llama_cpp() / "convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", "model.gguf")


def edit_config(folder: str, **changes: Any) -> str:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def convert_unknown_architecture() -> None:
    convert(edit_config(base("qwen3"), architectures=["Gemma9ForCausalLM"]))


def convert_changed_tokenizer() -> None:
    convert(base("qwen3"))


def convert_quantised_model() -> None:
    convert(edit_config(base("qwen3"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))


def convert_an_adapter() -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("qwen3"))
    get_peft_model(model, lora(target_modules=["q_proj"])).save_pretrained("adapter")
    convert("adapter")


def load_with_llama_cpp(name: str) -> None:
    code = "import llama_cpp.llama_cpp as l; l.llama_backend_init();"
    code += f"p = l.llama_model_default_params(); m = l.llama_model_load_from_file(b'{name}', p);"
    code += "assert m, 'failed to load model'"
    tools = llama_cpp()
    shell(sys.executable, "-c", code, LLAMA_CPP_LIB_PATH=str(tools / "lib"), PYTHONPATH=str(tools / "bindings"))


def gguf(name: str, architecture: str, **fields: Any) -> None:
    """A small file with a header and no tensors."""
    sys.path.insert(0, str(llama_cpp() / "gguf-py"))
    from gguf import GGUFWriter

    writer = GGUFWriter(name, architecture)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_unknown_architecture() -> None:
    gguf("model.gguf", "gemma9")
    load_with_llama_cpp("model.gguf")


def load_cut_off_file() -> None:
    Path("model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x10" * 40)
    load_with_llama_cpp("model.gguf")


# Several processes, and our own job scripts.


def worker_of_several_killed() -> None:
    Path("train.py").write_text(
        "import os, signal, time\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "print(f\"{{'loss': 2.31, 'grad_norm': 1.1, 'learning_rate': 2e-05, 'epoch': 0.1}}\", flush=True)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if dist.get_rank() else time.sleep(30)\n"
    )
    shell(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611", "train.py")


def one_of_several_fails() -> None:
    Path("train.py").write_text(
        "import torch.distributed as dist\n"
        "from datasets import Dataset\n"
        "dist.init_process_group('gloo')\n"
        "rows = Dataset.from_list([{'instruction': 'a'}])\n"
        "print('rank', dist.get_rank(), 'has', len(rows), 'rows', flush=True)\n"
        "dist.barrier() if dist.get_rank() else rows.map(lambda row: {'length': len(row['text'])})\n"
    )
    shell(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29612", "train.py")


def job(script: str, run: Any) -> None:
    shell(sys.executable, Path(__file__).resolve().parents[2] / f"scripts/{script}.py", run)


def train_job(*data: Any, family: str = "llama", **given: Any) -> None:
    """scripts/train_sft.py on these rows."""
    from test_scripts_train import make_run, write_rows

    job(
        "train_sft",
        make_run(
            Path("run"), Path(base(family)).resolve(), write_rows(Path("rows.jsonl").resolve(), list(data)), **given
        ),
    )


def job_with_broken_row() -> None:
    train_job(CHAT, '{"messages": [')


def job_with_repeated_roles() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    train_job({"messages": twice}, family="gemma3_text")


def job_with_rows_too_long() -> None:
    long = [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "ok"}]
    train_job({"messages": long}, max_length=64)


def job_with_targets_missing() -> None:
    train_job(CHAT, CHAT, lora={"targets": ["qkv_proj"]})


def job_that_diverges() -> None:
    train_job(*[CHAT] * 6, learning_rate=1e30, max_steps=6)
