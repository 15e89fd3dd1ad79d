"""The Modelfile by which Ollama runs a GGUF file.

Ollama renders chats by a Go template. It recognises the chat templates of some families in a GGUF file and leaves any
other to llama.cpp, so a template is written here wherever a chat is a plain sequence of messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

HEAD = "# made by hf-layerprune export"
PROBES = {"system": "Seven wise rules", "user": "A first question", "assistant": "An early answer"}
QUESTION = "The last question"


@dataclass(frozen=True)
class ChatFormat:
    """A chat as a plain sequence of messages."""

    around: dict[str, tuple[str, str]]  # what comes before and after a message, by its role
    opening: str  # what begins the answer
    system: str | None  # the message of the system that a chat without one begins with

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a chat, to be answered."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = ""
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.opening

    def to_modelfile(self) -> str:
        """The instructions of a Modelfile; the name of the model comes before them."""
        cases = " else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{'
            for role, (before, after) in self.around.items()
        )
        template = f"{{{{ range .Messages }}}}{{{{ {cases} end }}}}{{{{ end }}}}{self.opening}"
        system = "" if self.system is None else f'SYSTEM """{self.system}"""\n'
        return f'TEMPLATE """{template}"""\n{system}'


def modelfile(file_name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Modelfile for a GGUF file in the same folder."""
    chat = chat_format(tokenizer) if tokenizer.chat_template else None
    return f"{HEAD}\nFROM ./{file_name}\n" + (chat.to_modelfile() if chat else "")


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The chat template of a tokenizer as a [`ChatFormat`]; `None` if it does anything else, such as tell the date."""
    user, system = ({"role": role, "content": PROBES[role]} for role in ("user", "system"))
    answer, last = {"role": "assistant", "content": PROBES["assistant"]}, {"role": "user", "content": QUESTION}
    long = [system, user, answer, last]
    try:
        found = _parts(tokenizer, long)
        if found is None:
            return None
        bare = _rendered(tokenizer, [user])
        before, after = found.around["system"]
        start = bare.removesuffix(found.render([user]))
        if start != bare and start:
            if not (start.startswith(before) and start.endswith(after)):
                return None
            found = ChatFormat(found.around, found.opening, start[len(before) : len(start) - len(after)])
        chats = ([user], [system, user], [user, answer, last], long)
        same = all(_rendered(tokenizer, chat) == found.render(chat) for chat in chats)
    except Exception:  # a template is a program, and may fail in any way on a chat that it does not expect
        return None
    text = found.to_modelfile()
    plain = "strftime" not in str(tokenizer.chat_template) and text.count('"""') == 2 + 2 * (found.system is not None)
    pieces = "".join(map("".join, found.around.values())) + found.opening
    return found if same and plain and "{{" not in pieces else None


def _parts(tokenizer: PreTrainedTokenizerBase, long: list[dict[str, str]]) -> ChatFormat | None:
    """Cut a chat of all roles where its messages stand."""
    gaps, rest = [], _rendered(tokenizer, long)
    for message in long:
        gap, content, rest = rest.partition(message["content"])
        if not content:
            return None
        gaps.append(gap)
    after_user = _rendered(tokenizer, long, False).partition(QUESTION)[2]
    after_answer = _rendered(tokenizer, long[:3], False).partition(PROBES["assistant"])[2]
    before_user = gaps[3].removeprefix(after_answer)
    around = {
        "system": (gaps[0], gaps[1].removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (gaps[2].removeprefix(after_user), after_answer),
    }
    return ChatFormat(around, rest.removeprefix(after_user), None)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opening: bool = True) -> str:
    """A chat as text, without the begin token that llama.cpp puts before it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins else text
