"""Every bad experiment of tests/experiments/bad says exactly what the text file beside it says.

`NAME.yaml`, or `NAME/NAME.yaml` with files of its own, is checked alone in a copy of the corpus; `NAME.txt` holds what
`mergetune check` prints (errors, then the summary) and the exit code. What git or a small repository cannot hold is
made by a function of `MADE`. After reviewing a change of words, write the texts anew:

    python tests/test_bad_experiments.py --update
"""

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from pipeline.cli import app  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.yaml_text import MAX_BYTES  # noqa: E402

CORPUS = ROOT / "tests/experiments/bad"
UNPRIVILEGED = {"made-unreadable"}  # only a process without root's rights is refused


def good(name: str, dataset: str) -> str:
    """An experiment without a fault of its own."""
    return (
        f"name: {name}\nhypothesis: the answers become friendlier\n"
        "base: {model: Qwen/Qwen3-0.6B, revision: c1899de289a04d12100db370d81485cdf75e47ca}\n"
        f"data: {{dataset: {dataset}}}\ntrain: {{method: qlora, flavor: t4-small, timeout: 1h}}\n"
        f"output: {{repo: acme/{name}}}\nbudget: {{max_usd: 1}}\n"
    )


def _with_rows(folder: Path, name: str, rows: bytes) -> None:
    inside = folder / name
    inside.mkdir()
    (inside / "rows.jsonl").write_bytes(rows)
    (inside / f"{name}.yaml").write_text(good(name, f"tests/experiments/bad/{name}/rows.jsonl"))


def made_missing(folder: Path) -> None:
    """The name of a file that is not there."""


def made_folder(folder: Path) -> None:
    (folder / "made-folder.yaml").mkdir()


def made_folder_in_folder(folder: Path) -> None:
    (folder / "made-folder-in-folder/made-folder-in-folder.yaml").mkdir(parents=True)


def made_huge(folder: Path) -> None:
    (folder / "made-huge.yaml").write_text("- one more row\n" * (MAX_BYTES // 15 + 1))


def made_long_line(folder: Path) -> None:
    text = good("made-long-line", "acme/chats") + "notes: " + "x" * (MAX_BYTES // 2) + "\n"
    (folder / "made-long-line.yaml").write_text(text)


def made_many_keys(folder: Path) -> None:
    (folder / "made-many-keys.yaml").write_text("".join(f"k{number}: 1\n" for number in range(5_500)))


def made_deep_block(folder: Path) -> None:
    (folder / "made-deep-block.yaml").write_text("".join(" " * depth + "a:\n" for depth in range(700)))


def made_deep_flow(folder: Path) -> None:
    (folder / "made-deep-flow.yaml").write_text("name: " + "[" * (MAX_BYTES - 10) + "\n")


def made_many_faults(folder: Path) -> None:
    (folder / "made-many-faults.yaml").write_text("train:\n" + "".join(f"  key{number}: 1\n" for number in range(30)))


def made_unreadable(folder: Path) -> None:
    path = folder / "made-unreadable.yaml"
    path.write_text(good("made-unreadable", "acme/chats"))
    path.chmod(0)


def made_link_to_nothing(folder: Path) -> None:
    (folder / "made-link-to-nothing.yaml").symlink_to("nowhere.yaml")


def made_link_to_itself(folder: Path) -> None:
    (folder / "made-link-to-itself.yaml").symlink_to("made-link-to-itself.yaml")


def made_data_link_to_itself(folder: Path) -> None:
    _with_rows(folder, "made-data-link-to-itself", b"")
    rows = folder / "made-data-link-to-itself/rows.jsonl"
    rows.unlink()
    rows.symlink_to("rows.jsonl")


def made_data_leaves_by_a_link(folder: Path) -> None:
    outside = folder.parents[3] / "outside.jsonl"
    outside.write_text('{"role of a secret": "of this machine"}\n')
    _with_rows(folder, "made-data-leaves-by-a-link", b"")
    rows = folder / "made-data-leaves-by-a-link/rows.jsonl"
    rows.unlink()
    rows.symlink_to(outside)


def made_data_long_line(folder: Path) -> None:
    _with_rows(folder, "made-data-long-line", b'{"text": "' + b"x" * 100_000_000 + b'"}\n')


def made_data_long_line_without_end(folder: Path) -> None:
    _with_rows(folder, "made-data-long-line-without-end", b"[" * 20_000_000)


def made_data_deep_json(folder: Path) -> None:
    _with_rows(folder, "made-data-deep-json", b"[" * 100_000 + b"\n")


MADE: dict[str, Callable[[Path], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(made_missing, made_folder, made_folder_in_folder, made_huge, made_long_line, made_many_keys),
        *(made_deep_block, made_deep_flow, made_many_faults, made_unreadable, made_link_to_nothing),
        *(made_link_to_itself, made_data_link_to_itself, made_data_leaves_by_a_link, made_data_long_line),
        *(made_data_long_line_without_end, made_data_deep_json),
    )
}


def cases() -> list[str]:
    """Names of all cases: YAML files of the corpus (a folder's counts once), and what is made here."""
    return sorted({path.stem for path in CORPUS.rglob("*.yaml")} | set(MADE))


@contextlib.contextmanager
def repository(folder: Path) -> Iterator[Path]:
    """A repository that holds a copy of the corpus, as the current folder."""
    root = folder / "repository"
    shutil.copytree(CORPUS, root / "tests/experiments/bad")
    (root / "pyproject.toml").write_text('[tool.mergetune]\nnamespaces = ["acme"]\n')
    before = Path.cwd()
    os.chdir(root)
    try:
        yield root
    finally:
        os.chdir(before)


def said(name: str, root: Path) -> str:
    """What `mergetune check` prints about one case in the current folder, and its exit code."""
    bad = Path("tests/experiments/bad")
    if name in MADE:
        MADE[name](bad.absolute())
    path = bad / name / f"{name}.yaml" if (bad / name).is_dir() else bad / f"{name}.yaml"
    if name in UNPRIVILEGED:
        return _in_a_process(path)
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        try:
            code = app(["check", path.as_posix()], standalone_mode=False)
        except UserError as error:
            print(error.as_text(), file=sys.stderr)
            code = error.exit_code
    return f"{errors.getvalue()}{output.getvalue()}exit code {code or 0}\n"


def _in_a_process(path: Path) -> str:
    drop: list[str] = []
    if os.geteuid() == 0:
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        if not shutil.which("setpriv") or subprocess.run([*drop, "true"], capture_output=True, check=False).returncode:
            pytest.skip("running as root, and setpriv cannot put its rights aside")
    done = subprocess.run(
        [*drop, sys.executable, "-m", "pipeline", "check", path.as_posix()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return f"{done.stderr}{done.stdout}exit code {done.returncode}\n"


def expected_path(name: str) -> Path:
    """Where the expected text of a case lies."""
    inside = CORPUS / name
    return inside / f"{name}.txt" if inside.is_dir() else CORPUS / f"{name}.txt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bad")
    with repository(folder) as root:
        yield root
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", cases())
def test_a_bad_experiment_is_told_what_to_do(name: str, corpus: Path) -> None:
    assert said(name, corpus) == expected_path(name).read_text(encoding="utf-8")


def test_the_corpus_is_large_and_every_text_belongs_to_a_case() -> None:
    texts = {path.stem for path in CORPUS.rglob("*.txt")}
    assert texts == set(cases())
    assert len(texts) >= 70


def test_all_of_them_in_one_call(tmp_path: Path) -> None:
    with repository(tmp_path):
        command = [sys.executable, "-m", "pipeline", "check", "tests/experiments/bad"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(f"{len(cases()) - len(MADE)} checked, ")


def main() -> None:
    """Write every expected text, or only show the ones that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the texts; review them with `git diff`")
    update = parser.parse_args().update
    with tempfile.TemporaryDirectory() as folder, repository(Path(folder)) as root:
        for name in cases():
            path, now = expected_path(name), said(name, root)
            if path.exists() and path.read_text(encoding="utf-8") == now:
                continue
            print(path.relative_to(ROOT))
            if update:
                path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
