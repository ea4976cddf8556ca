"""The tasks: what a row looks like, how it becomes a prompt, how answers are made and judged.

Adding a task of your own is one call::

    from helpers.tasks import Task, register
    register(Task(
        name="titles", title="Headline writing", columns=("article",), target="headline",
        template="<Article>: {article}\\n<Headline>: ", max_new_tokens=32, metric="chrf"))

after which ``data.load_rows``, the fine-tuning notebook and the panel know it.
"""

import re
import string
from dataclasses import dataclass, field

from helpers import WorkbookError, closest


@dataclass(frozen=True)
class Task:
    """One task.

    columns: the row's fields that the prompt shows, in order. target: the one the model must write.
    optional: columns that may be empty; the template's line that holds an empty one is left out.
    hub_columns: this task's column name -> the hub dataset's, where they differ.
    stop: text at which generated answers are cut (None: only at the end-of-text token).
    metric: the metric that a result is summed up by; one of helpers.evaluation's.
    samples: rows without the target, used as ready-made prompts.
    ask: what a chat model is told before the columns, to judge the base model as one.
    generation: how the panel generates, where that is not greedy: fields of `adapters.Settings`.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    target: str
    template: str
    optional: tuple[str, ...] = ()
    hub_dataset: str | None = None
    hub_columns: dict[str, str] = field(default_factory=dict)
    hub_licence: str = "see the dataset's own card"
    max_new_tokens: int = 64
    stop: str | None = "\n"
    metric: str = "chrf"
    samples: tuple[dict[str, str], ...] = ()
    ask: str = ""
    generation: dict = field(default_factory=dict)

    def __post_init__(self):
        try:
            fields = [part[1:] for part in string.Formatter().parse(self.template)]
        except ValueError as error:
            raise WorkbookError(f"task {self.name!r}: the template cannot be read ({error}): write "
                                "a brace that is meant as one twice.") from error
        plain = [(name, "", None) for name in self.columns]  # no format and no conversion
        found = [part for part in fields if part[0] is not None]
        if found != plain or not all(name.isidentifier() for name in self.columns):
            raise WorkbookError(f"task {self.name!r}: the template's fields must be the columns "
                                f"{list(self.columns)}, each once and in this order.")

    def prompt(self, row: dict[str, str]) -> str:
        """The text up to where the completion begins. Raises WorkbookError for a missing column."""
        lines = []
        for line in self.template.splitlines(keepends=True):
            names = [name for _, name, _, _ in string.Formatter().parse(line) if name]
            values = {name: self._value(row, name) for name in names}
            if not names or any(values.values()) or not set(names) <= set(self.optional):
                lines.append(line.format(**values))
        return "".join(lines)

    def row(self, prompt: str) -> dict[str, str] | None:
        """The columns that a prompt shows; None if it is not one of this task."""
        pattern = "".join(re.escape(text) + (f"(?P<{name}>.*)" if name else "")
                          for text, name, _, _ in string.Formatter().parse(self.template))
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        return found and found.groupdict()

    def completion(self, row: dict[str, str]) -> str:
        """The text that the model must write after the prompt, without the end-of-text token."""
        return self._value(row, self.target).strip()

    def on_one_line(self, target: str) -> str:
        """A query without line breaks, where they mean nothing: outside quotes, and if it has no
        comment up to the line's end. Targets of other tasks stay as they are."""
        parts = re.split(r"""('[^']*'|"[^"]*")""", target)  # every second one is quoted
        if self.metric != "execution" or any("--" in part for part in parts[::2]):
            return target
        parts[::2] = [re.sub(r"\s*[\r\n]\s*", " ", part) for part in parts[::2]]
        return "".join(parts)

    def _value(self, row: dict[str, str], name: str) -> str:
        if name not in row and name not in self.optional:
            raise WorkbookError(f"task {self.name!r} needs the column {name!r}, and the row has "
                                f"only {sorted(row)}.")
        return row.get(name, "")

    def chat(self, row: dict[str, str]) -> str:
        """The same request in plain words, for the user's turn of a chat template."""
        parts = [self.ask, *(row.get(name, "") for name in self.columns)]
        return "\n\n".join(part for part in parts if part)

    def answer(self, generated: str) -> str:
        """What counts as the model's answer: the text before `stop`, trimmed."""
        text = generated.strip()
        return text.split(self.stop)[0].strip() if self.stop else text


TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Add a task (or replace one of the same name) and return it."""
    TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of that name. Raises WorkbookError with the closest known name."""
    if str(name) in TASKS:  # a parameter may be of any type
        return TASKS[str(name)]
    raise WorkbookError(f"task {name!r} is unknown: add it with helpers.tasks.register, or use a "
                        f"known one; {closest(name, TASKS)}")


register(Task(
    name="instruct", title="General instruction following",
    columns=("instruction", "input"), target="response", optional=("input",),
    template="<Instruction>: {instruction}\n<Input>: {input}\n<Response>: ",
    hub_dataset="teknium/GPTeacher-General-Instruct", hub_licence="MIT",
    max_new_tokens=128, stop=None, metric="rouge_l",
    generation={"repetition_penalty": 1.1},  # small models loop when they write freely
    samples=(
        {"instruction": "Sort these words alphabetically.", "input": "pear, apple, mango, fig"},
        {"instruction": "Write a short thank-you note to Maria for her help with moving.",
         "input": ""},
        {"instruction": "Name three things you can do to sleep better.", "input": ""},
        {"instruction": "Summarise the text in one sentence.",
         "input": "The library opens at nine. On Sundays it stays closed, except in December, when "
                  "it opens from noon to five so that students can prepare for their exams."},
    ),
))

register(Task(
    name="sql", title="English to SQL", columns=("context", "question"), target="answer",
    template="<TABLE>: {context}\n<QUESTION>: {question}\n<SQL>: ",
    hub_dataset="philschmid/sql-create-context-copy", hub_licence="CC BY 4.0",
    max_new_tokens=96, metric="execution",
    ask="Write one SQLite query that answers the question. Write nothing but the query.",
    samples=(
        {"context": "CREATE TABLE employees (name VARCHAR, department VARCHAR, salary INTEGER, "
                    "city VARCHAR)",
         "question": "How many employees work in the Sales department?"},
        {"context": "CREATE TABLE matches (venue VARCHAR, season INTEGER, home_team VARCHAR, "
                    "attendance INTEGER)",
         "question": "What is the highest attendance when the home team is Rovers?"},
        {"context": "CREATE TABLE books (title VARCHAR, author VARCHAR, pages INTEGER, "
                    "year INTEGER)",
         "question": "Which title has more than 300 pages and was written by Ann Lee?"},
    ),
))

register(Task(
    name="detox", title="Detoxifying text", columns=("toxic",), target="neutral",
    template="<Toxic>: {toxic}\n<Neutral>: ",
    hub_dataset="s-nlp/paradetox", hub_licence="openrail++",
    hub_columns={"toxic": "en_toxic_comment", "neutral": "en_neutral_comment"},
    max_new_tokens=48, metric="chrf",
    ask="Rewrite this text politely and keep its meaning. Write nothing but the new text.",
    samples=({"toxic": "this stupid printer never works when i need it"},
             {"toxic": "what the hell is wrong with your dumb schedule"},
             {"toxic": "only an idiot would park a car like that"}),
))
