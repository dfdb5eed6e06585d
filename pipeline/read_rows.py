"""The rows of one data file while it is read: each checked, its faults kept by kind. Opens no file."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.dataset_facts import Lines, Problem, RowIssue
from pipeline.rows import BadRow, DataRow, check_row


@dataclass
class ReadRows:
    """Good rows with their lines, and what is wrong with the others. `sampled`: some were only counted."""

    pairs: bool = False  # rows are two answers each
    total: int = 0
    rows: list[tuple[int, DataRow]] = field(default_factory=list)
    problems: dict[Problem, list[RowIssue]] = field(default_factory=dict)
    sampled: bool = False

    def add(self, problem: Problem, line: int, message: str, hint: str) -> None:
        """A row that cannot be used."""
        self.problems.setdefault(problem, []).append(RowIssue(line, message, hint))

    def check(self, line: int, value: Any) -> None:
        """Keep a parsed row if it is one, and of the format of the first."""
        try:
            row = check_row(value, self.pairs)
        except BadRow as error:
            self.add(error.problem, line, error.message, error.hint)
            return
        if self.rows and row.kind != self.rows[0][1].kind:
            first_line, first = self.rows[0]
            message = f"this row is {row.kind}, line {first_line} is {first.kind}"
            self.add(Problem.MIXED, line, message, "use one format for the whole file")
            return
        self.rows.append((line, row))

    def characters(self) -> int:
        """Of all text in the good rows."""
        both = [row.with_rejected() for _, row in self.rows if row.rejected is not None]
        rows = [row for _, row in self.rows] + both
        chats = sum(len(str(message["content"])) for row in rows for message in row.messages)
        return chats + sum(len(row.prompt) + len(row.completion) for row in rows if not row.is_chat)

    def same(self) -> Lines:
        """Pairs whose answers do not differ."""
        return Lines.of([line for line, row in self.rows if row.is_same])

    def duplicates(self) -> Lines:
        """Rows that repeat an earlier one."""
        seen: set[str] = set()
        repeated = []
        for line, row in self.rows:
            digest = row.digest()
            if digest in seen:
                repeated.append(line)
            seen.add(digest)
        return Lines.of(repeated)
