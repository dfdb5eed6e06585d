"""Rules about job scripts: ours and a good custom one pass, each known mistake fails."""

import pytest
from rule_cases import HEADER, ROOT, expect, place, run, with_script

from pipeline.rules.script_text import header_of, is_pinned, package
from pipeline.rules.scripts import (
    no_flash_attn,
    no_login,
    no_secrets_table,
    no_token_text,
    prints_no_secret,
    processor_has_pillow,
    pushes_at_the_end,
    script_has_header,
    script_parses,
    trainer_arguments_exist,
)

RULES = (
    *(script_parses, script_has_header, no_flash_attn, no_secrets_table, no_login, no_token_text),
    *(trainer_arguments_exist, pushes_at_the_end, prints_no_secret, processor_has_pillow),
)
OURS = {f"scripts/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "scripts").glob("*.py"))}
GOOD_SCRIPT = (
    HEADER
    + """\
import os
from trl import SFTConfig, SFTTrainer

token = os.environ.get("HF_TOKEN")
print("token is", "set" if bool(token) else "missing", os.environ["HOME"], os.environ.get("JOB_ID"), sorted(os.environ))
api.login_count()
trainer = SFTTrainer("x", args=SFTConfig(push_to_hub=True), processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
"""
)
TEXT = with_script()
TOKEN = "hf_" + "A1b2C3d4" * 4

BAD = [
    (script_parses, "def f(:\n", "`my/train.py:4` is not Python", "mend line 4"),
    (no_login, "from huggingface_hub import login\nlogin(token=t)\n", "py:5` calls `login()`", "remove line 5"),
    (no_login, "import huggingface_hub\nhuggingface_hub.login()\n", "py:5` calls `login()`", "remove line 5"),
    (no_token_text, 'secrets = {"HF_TOKEN": "$HF_TOKEN"}\n', "py:4` passes a placeholder", "remove it from line 4"),
    (no_token_text, f'token = "{TOKEN}"\n', "py:4` holds something of the shape", "revoke the token"),
    (trainer_arguments_exist, "SFTTrainer(m, tokenizer=t)\n", "passes `tokenizer=`", "write `processing_class=`"),
    (
        trainer_arguments_exist,
        "SFTTrainer(m, model_init_kwargs={})\n",
        "`model_init_kwargs=`",
        "`SFTConfig(model_init_",
    ),
    (trainer_arguments_exist, "trl.SFTTrainer(m, max_seq_length=8)\n", "`max_seq_length=`", "`SFTConfig(max_length="),
    (pushes_at_the_end, "SFTConfig(\n  push_to_hub=True)\n", "py:4` sets `push_to_hub=True`", "trainer.push_to_hub()"),
    (prints_no_secret, 'import os\nt = os.environ["HF_TOKEN"]\nprint(f"x {t[:4]}")\n', "py:6` prints", "remove line 6"),
    (prints_no_secret, 'import os\nprint(os.getenv("API_KEY"))\n', "py:5` prints a secret", "remove line 5"),
    (prints_no_secret, "import os\nprint(dict(os.environ))\n", "py:5` prints a secret", "remove line 5"),
    (prints_no_secret, "t = get_token()\nlogging.info('t %s', t)\n", "py:5` prints a secret", "remove line 5"),
    (processor_has_pillow, "p = AutoProcessor.from_pretrained(b)\n", "which needs Pillow", "add `pillow==<version>`"),
    (processor_has_pillow, "SFTTrainer('google/gemma-3-12b-it')\n", "which needs Pillow", "add `pillow==<version>`"),
]
BAD_HEADER = [
    (script_has_header, "import trl\n", "no readable PEP 723 header", "start `my/train.py` with `# /// script`"),
    (script_has_header, "# /// script\n# dependencies = [\n# ///\n", "no readable PEP 723", "`# dependencies = […]`"),
    (
        script_has_header,
        HEADER.replace("==1.16.0", ">=0.12"),
        "not pin `trl>=0.12`",
        "write `trl==1.16.0`",
    ),
    (script_has_header, HEADER.replace("trl==1.16.0", "wibble"), "not pin `wibble`", "write `wibble==<version>`"),
    (no_flash_attn, HEADER.replace("trl", "flash_attn"), "depends on `flash-attn`", "by `kernels==0.18.2`"),
    (
        no_secrets_table,
        '# /// script\n# dependencies = []\n# [tool.hf-jobs]\n# secrets = ["AWS_KEY"]\n# ///\n',
        "asks for `secrets` in `[tool.hf-jobs]`",
        "remove `secrets`",
    ),
]


@pytest.mark.parametrize("rule", RULES)
def test_ok(rule) -> None:
    assert run(rule, scripts=OURS) is None
    assert run(rule, TEXT, scripts={**OURS, "my/train.py": GOOD_SCRIPT}) is None
    assert run(rule, TEXT, scripts={}) is None


@pytest.mark.parametrize(("rule", "body", "message", "hint"), BAD)
def test_bad_custom_script(rule, body, message, hint) -> None:
    finding = run(rule, TEXT, scripts={**OURS, "my/train.py": HEADER + body})
    expect(finding, message, hint, place(TEXT, "my/train.py"))
    assert TOKEN not in finding.as_text()


@pytest.mark.parametrize(("rule", "text", "message", "hint"), BAD_HEADER)
def test_bad_header(rule, text, message, hint) -> None:
    expect(run(rule, TEXT, scripts={**OURS, "my/train.py": text}), message, hint, place(TEXT, "my/train.py"))


def test_a_fault_of_a_shipped_script_stands_at_train() -> None:
    finding = run(no_login, TEXT, scripts={"scripts/evaluate.py": "login()"})
    expect(finding, "`scripts/evaluate.py:1`", "remove line 1 of `scripts/evaluate.py`", place(TEXT, "method: qlora"))


def test_a_methods_own_login_is_not_the_hubs() -> None:
    assert run(no_login, TEXT, scripts={"my/train.py": HEADER + "wandb.login()\n"}) is None


@pytest.mark.parametrize("rule", RULES[1:])
def test_text_that_is_not_python_has_one_finding_only(rule) -> None:
    assert (
        run(rule, TEXT, scripts={"my/train.py": HEADER + "def f(:\n\0 SFTTrainer( push_to_hub=True get_token("}) is None
    )


@pytest.mark.parametrize(
    ("wanted", "pinned"),
    [
        ("trl==1.16.0", True),
        ("trl == 1.16.0 ; python_version > '3.11'", True),
        ("trl===1.16", True),
        ("trl", False),
        ("trl>=1", False),
        ("trl>=1,==1.*,<2", False),
        ("trl @ git+https://github.com/huggingface/trl@main", False),
        (f"trl @ git+https://github.com/huggingface/trl@{'0a' * 20}", True),
    ],
)
def test_pins(wanted, pinned) -> None:
    assert is_pinned(wanted) is pinned


def test_names_and_headers() -> None:
    assert package("Flash_Attn[x] >= 2") == "flash-attn"
    assert package("trl@git+https://x") == "trl"
    assert header_of("# /// script\n#\n# dependencies = []\n# ///\n# /// other\n# x\n# ///\n") == {"dependencies": []}


def test_strange_headers_and_deep_nesting_are_no_crash() -> None:
    texts = ["tool = 3", "tool.hf-jobs = 3", "dependencies = 3", 'dependencies = ["", "=="]']
    deep = "import os\nt = os.environ['HF_TOKEN']\nprint(" + "+".join(["1"] * 4000) + ")\nlogin(push_to_hub=True)\n"
    for header in texts:
        for rule in RULES:
            run(rule, TEXT, scripts={"my/train.py": f"# /// script\n# {header}\n# ///\n{deep}"})
